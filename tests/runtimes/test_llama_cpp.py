"""The llama.cpp runtime against plain forward passes of the same weights in transformers."""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from qgrid.contracts import Generation
from qgrid.gguf import convert
from qgrid.gguf.log import Log
from qgrid.runtimes import llama_cpp as runtime
from qgrid.runtimes._llama_pieces import Piece, passes
from qgrid.types import Cell
from tests.gguf.listening import listening
from tests.runtimes import random_gguf
from tests.runtimes.batching import decoded, divergence
from tests.runtimes.passes import Ids, distance, plain, some_ids

FAR = 0.1  # nats: the cache holds 16-bit keys and values; a wrong position or mask costs whole nats
NEAR_TIE = 0.05  # nats between the two best tokens, where rounding may decide

MakeCell = Callable[..., Cell]


@pytest.fixture(scope="module")
def artifact(tiny_random: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model as an F16 file."""
    folder = tmp_path_factory.mktemp("f16")
    convert.convert(tiny_random, folder / runtime.WEIGHTS, "F16")
    shutil.copy(tiny_random / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def engine(artifact: Path, llama_cell: MakeCell) -> Iterator[runtime.LlamaCpp]:
    loaded = runtime.load(artifact, llama_cell(), "float32")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def model(tiny_random: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_random, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def quantized(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The same file in another type: `quantized(random_gguf.Q8_0)`."""

    def make(number: int) -> Path:
        folder = tmp_path_factory.mktemp("quantized")
        random_gguf.quantize(artifact / runtime.WEIGHTS, folder / runtime.WEIGHTS, number)
        return folder

    return make


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[Ids]:
    rng = random.Random(seed)
    return [some_ids(rng, length) for length in lengths]


def require_greedy(
    model: Any, prompts: Sequence[Ids], made: Sequence[Generation], length: int
) -> None:
    """Every token is the best one of a plain pass, or nearly; and most are exactly that."""
    exact = 0
    for prompt, each in zip(prompts, made, strict=True):
        assert len(each.ids) == len(each.seconds) == length
        rows = plain(model, [*prompt, *each.ids])[len(prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(each.ids)[:, None])[:, 0]
        assert float((rows.amax(1) - chosen).max()) <= NEAR_TIE
        exact += int((rows.argmax(1) == torch.tensor(each.ids)).sum())
    assert exact >= 0.95 * length * len(prompts)


def test_batches_and_chunks_equal_plain_forward_passes(
    engine: runtime.LlamaCpp, model: Any, sequences: list[Ids]
) -> None:
    rng = random.Random(1)
    keep = [rng.randrange(1, len(ids)) for ids in sequences]
    keep[20:23], keep[23] = [1, 3, 2], 1299
    assert distance(cast(Any, engine), model, sequences, keep, []) <= FAR


@pytest.mark.parametrize("length", [1, 2, 70])
def test_a_shared_prefix_equals_plain_forward_passes(
    engine: runtime.LlamaCpp, model: Any, sequences: list[Ids], length: int
) -> None:
    rng = random.Random(2)
    keep = [rng.randrange(1, len(ids) + 1) for ids in sequences]
    keep[20:23], keep[23] = [1, 3, 2], 1300
    prefix = some_ids(random.Random(3), length)
    assert distance(cast(Any, engine), model, sequences, keep, prefix) <= FAR


def test_scores_are_close_on_average(engine: runtime.LlamaCpp, model: Any) -> None:
    ids = some_ids(random.Random(4), 400)
    found = next(engine.score([ids], [399])).logprobs
    base = plain(model, ids)[:-1]
    assert float((base.exp() * (base - found)).sum(1).mean()) <= 1e-5


def test_more_choices_than_places(engine: runtime.LlamaCpp, model: Any) -> None:
    """Ninety continuations of one beginning: the library's places are used again."""
    rng = random.Random(5)
    shared = some_ids(rng, 30)
    rows = [shared + some_ids(rng, 2) for _ in range(90)]
    assert distance(cast(Any, engine), model, rows, [2] * 90, some_ids(rng, 12)) <= FAR


def test_more_rows_of_one_beginning_than_a_chunk(engine: runtime.LlamaCpp, model: Any) -> None:
    """The library aborts where a pass gives more rows than were set aside."""
    rng = random.Random(11)
    shared = some_ids(rng, 200)
    rows = [shared + some_ids(rng, 101) for _ in range(8)]
    assert distance(cast(Any, engine), model, rows, [100] * 8, []) <= FAR


def test_prose_does_not_depend_on_what_is_scored_beside_it(engine: runtime.LlamaCpp) -> None:
    """As llama-perplexity does it: windows of 128 would fit four in a pass."""
    windows = prompts_of([128] * 4, seed=12)
    together = [each.logprobs for each in engine.score(windows, [63] * 4)]
    alone = [next(iter(engine.score([ids], [63]))).logprobs for ids in windows]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_passes_smaller_than_a_sequence(
    artifact: Path, llama_cell: MakeCell, model: Any, sequences: list[Ids]
) -> None:
    """Everything is cut at every border that a pass can have."""
    loaded = runtime.load(artifact, llama_cell({"batch": 17, "ubatch": 16}), "float32")
    rows = [*sequences[:12], *sequences[20:23]]
    keep = [min(6, len(ids) - 1) for ids in rows]
    assert distance(cast(Any, loaded), model, rows, keep, sequences[9]) <= FAR
    prompts = prompts_of([20, 3, 40])
    require_greedy(model, prompts, loaded.generate(prompts, 5), 5)
    loaded.close()


def test_rows_are_cut_alike_whatever_is_asked_beside(
    engine: runtime.LlamaCpp, quantized: Callable[[int], Path], llama_cell: MakeCell
) -> None:
    """A cell and its baseline give the same chunks: lengths and `keep` alone decide."""
    rows = prompts_of([600, 30, 30, 1200])
    keep = [599, 5, 29, 1100]
    other = runtime.load(quantized(random_gguf.Q8_0), llama_cell(bits=8), "float32")
    first, second = (
        [(s.sequence, s.start, len(s.logprobs)) for s in each.score(rows, keep)]
        for each in (engine, other)
    )
    assert first == second
    assert [each for each in first if each[0] == 3] == [
        (3, 100, 413),
        (3, 512 + 1, 512),
        (3, 1025, 175),
    ]
    other.close()


def test_keep_needs_a_token_before_it(engine: runtime.LlamaCpp) -> None:
    with pytest.raises(ValueError, match=r"`keep=3` of sequence 0 should be between 1 and 2"):
        list(engine.score([[1, 2, 3]], [3]))


def test_generation_is_greedy_and_timed(engine: runtime.LlamaCpp, model: Any) -> None:
    prompts = prompts_of([30, 4, 170])
    made = engine.generate(prompts, 8)
    require_greedy(model, prompts, made, 8)
    for each in made:
        assert all(a < b for a, b in itertools.pairwise((0.0, *each.seconds)))


def test_sixty_four_at_once_give_the_ids_of_one_at_a_time(
    engine: runtime.LlamaCpp, model: Any
) -> None:
    rng = random.Random(6)
    prompts = prompts_of([rng.randrange(3, 120) for _ in range(64)])
    together = engine.generate(prompts, 8)
    require_greedy(model, prompts, together, 8)
    alone = [engine.generate([prompt], 8)[0].ids for prompt in prompts]
    same = sum(each.ids == ids for each, ids in zip(together, alone, strict=True))
    assert same >= 62  # a near tie may fall to either side


def test_waiting_requests_take_the_places_of_finished_ones(
    engine: runtime.LlamaCpp, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three places and eleven prompts; a later request has its first token later."""
    monkeypatch.setattr(runtime, "_MAX_PLACES", 3)
    prompts = prompts_of([20 + i for i in range(11)], seed=7)
    made = engine.generate(prompts, 6)
    require_greedy(model, prompts, made, 6)
    firsts = [each.seconds[0] for each in made]
    assert firsts == sorted(firsts)
    assert firsts[-1] > made[0].seconds[-1]


def test_a_long_prompt_does_not_hold_up_the_others(
    artifact: Path, llama_cell: MakeCell, model: Any
) -> None:
    """Continuous batching: a short request decodes between the pieces of a long prompt."""
    loaded = runtime.load(artifact, llama_cell({"batch": 64, "ubatch": 64}), "float32")
    prompts = prompts_of([10, 400], seed=8)
    short, long = loaded.generate(prompts, 6)
    require_greedy(model, prompts, [short, long], 6)
    assert short.seconds[-1] < long.seconds[0]
    loaded.close()


def test_stop_tokens_end_requests_in_any_order(engine: runtime.LlamaCpp) -> None:
    """Requests end at different times: the others move together and go on as before."""
    prompts = prompts_of([12 + 3 * i for i in range(12)], seed=9)
    free = engine.generate(prompts, 12)
    stop = {free[2].ids[0], free[5].ids[3], free[8].ids[6], free[11].ids[9]}
    stopped = engine.generate(prompts, 12, stop=sorted(stop))
    lengths = set()
    for whole, cut in zip(free, stopped, strict=True):
        length = next((i for i, token in enumerate(whole.ids) if token in stop), 12)
        assert cut.ids == whole.ids[:length]
        assert len(cut.seconds) == length
        lengths.add(length)
    assert len(lengths) >= 4


def test_nothing_to_generate(engine: runtime.LlamaCpp) -> None:
    assert engine.generate([], 5) == []
    assert engine.generate([[1, 2]], 0) == [Generation((), ())]


def test_calls_do_not_see_each_other(engine: runtime.LlamaCpp) -> None:
    """Also where a caller leaves a sequence half-read."""
    rows, keep = prompts_of([700, 20]), [690, 3]
    prefix = some_ids(random.Random(10), 20)
    before = [each.logprobs for each in engine.score(rows, keep, prefix)]
    ids = engine.generate(rows, 5)[0].ids
    next(iter(engine.score(rows[::-1], [3, 600])))
    assert engine.generate(rows, 5)[0].ids == ids
    after = [each.logprobs for each in engine.score(rows, keep, prefix)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_context_is_made_after_the_first_batch(engine: runtime.LlamaCpp) -> None:
    """Loads of different size take turns in one context: a timed batch never waits for one."""
    engine.generate(prompts_of([30] * 4), 4)
    held = dict(engine._contexts)
    for count in (1, 4, 2):
        engine.generate(prompts_of([30] * count), 4)
    assert engine._contexts[False] is held[False]


@pytest.mark.parametrize(("file_type", "bits", "bound"), [(1, 16, 1e-4), (15, 4, 2e-2)])
def test_decoding_together_is_decoding_alone(
    tmp_path: Path, llama_cell: MakeCell, file_type: int, bits: int, bound: float
) -> None:
    """The same tokens fed; K-quants multiply otherwise for several rows than for one."""
    random_gguf.write(tmp_path / "plain.gguf", random_gguf.SMALL)
    random_gguf.quantize(tmp_path / "plain.gguf", tmp_path / runtime.WEIGHTS, file_type)
    loaded = runtime.load(tmp_path, llama_cell(bits=bits), "float32")
    rows = prompts_of([60] * 8)
    assert divergence(loaded, rows) <= bound
    other = decoded(loaded, rows[:1])  # of another context: a wrong comparison would be far off
    assert float((other - decoded(loaded, rows[1:2])).abs().max()) > 1
    loaded.close()


def test_pieces_are_cut_at_any_border() -> None:
    pieces = [
        Piece([1, 2, 3, 4, 5], 10, (0, 1), 2),
        Piece([6], 15, (0,), 1),
        Piece([7, 8], 15, (1,), 0),
    ]
    for size in range(1, 10):
        groups = list(passes(pieces, size))
        tokens = [
            (token, piece.start + i, tuple(piece.places), i >= len(piece.ids) - piece.rows)
            for group in groups
            for piece in group
            for i, token in enumerate(piece.ids)
        ]
        assert all(sum(len(piece.ids) for piece in group) <= size for group in groups)
        assert all(sum(len(p.ids) for p in group) == size for group in groups[:-1])
        assert tokens == [
            (1, 10, (0, 1), False),
            (2, 11, (0, 1), False),
            (3, 12, (0, 1), False),
            (4, 13, (0, 1), True),
            (5, 14, (0, 1), True),
            (6, 15, (0,), True),
            (7, 15, (1,), False),
            (8, 16, (1,), False),
        ]


def test_the_log_is_captured_and_given_back(
    artifact: Path, llama_cell: MakeCell, capfd: pytest.CaptureFixture[str]
) -> None:
    import llama_cpp

    with listening() as heard:
        loaded = runtime.load(artifact, llama_cell(), "float32")
        loaded.generate([[1, 2, 3]], 3)
        list(loaded.score([[1, 2, 3]], [2]))
        loaded.close()
        assert not heard
        params = llama_cpp.llama_model_default_params()
        llama_cpp.llama_model_load_from_file(b"/nowhere.gguf", params)
        assert any("nowhere" in line for line in heard)
    assert capfd.readouterr().err == ""


def test_messages_in_parts_are_joined() -> None:
    log = Log()
    for level, text in [(2, "loading "), (5, ".\n"), (1, "noise "), (5, "more"), (4, "no file\n")]:
        log.add(level, text)
    assert log.lines == ["loading .", "no file"]
    assert log.problems() == "no file"
    assert str(log.error("load x")) == "llama.cpp cannot load x: no file"
    log.add(4, "unable to allocate CPU buffer\n")
    assert isinstance(log.error("load x"), MemoryError)


def test_options_of_the_shipped_yaml(compose: Any, llama_cell: MakeCell) -> None:
    found = compose(["runtime=llama_cpp"]).values["runtime"]
    own = {field.name for field in dataclasses.fields(runtime.Options)}
    assert {key: found[key] for key in own} == llama_cell().runtime.options
    assert found["dtype"] == found["speed_dtype"] == "float32"
    assert runtime.refusal(llama_cell()) is None
