"""The quantized KV cache of the transformers runtime against decoding with one made by hand."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import QuantoQuantizedLayer

from qgrid import registry
from qgrid.contracts import Unsupported
from qgrid.demo import MODEL_DIR, SLICES_DIR
from qgrid.measure import prose
from qgrid.planning import baseline
from qgrid.runtimes import _kv_cache
from qgrid.runtimes import transformers as runtime
from qgrid.runtimes._kv_cache import Quantization
from qgrid.runtimes._piecewise import PieceScorer
from qgrid.runtimes._scoring import Scorer
from qgrid.types import Cell, Dtype, KvCache, Model, PlannedCell
from tests.conftest import write_model
from tests.runtimes.hand_cache import decoded
from tests.runtimes.passes import Ids, some_ids

MakeCell = Callable[..., Cell]
CASES = [("hqq", 8, 64), ("hqq", 4, 64), ("hqq", 2, 32), ("quanto", 4, 32), ("quanto", 2, 64)]
RESIDUAL = 16


@pytest.fixture(scope="module")
def exact(tiny_random: Path) -> Any:
    """In fp64, so that no number lies between two codes by an error of addition."""
    return AutoModelForCausalLM.from_pretrained(tiny_random, dtype=torch.float64).eval()


@pytest.mark.parametrize(("backend", "bits", "group"), CASES)
@pytest.mark.parametrize("lead", [0, 1, 9, 37])
def test_pieces_in_batches_equal_decoding_one_by_one(
    exact: Any, backend: str, bits: int, group: int, lead: int
) -> None:
    """Padding, neighbours and a shared beginning change nothing."""
    asked = Quantization(backend, bits, group, RESIDUAL)
    rng = random.Random(lead)
    prefix = some_ids(rng, lead)
    sequences = [some_ids(rng, length) for length in (3, 50, 9, 17, 8, 33)]
    keep = [1, 40, 4, 16, 7, 5]
    found = list(PieceScorer(exact, asked, 4096, 0).score(sequences, keep, prefix))
    plain = list(Scorer(exact, 4096, True, 0).score(sequences, keep, prefix))
    assert [each.sequence for each in found] == list(range(6))
    worst, moved = 0.0, 0.0
    for rows, without in zip(found, plain, strict=True):
        ids = prefix + sequences[rows.sequence]
        start = lead + rows.start - 1
        expected = decoded(exact, asked, ids, asked.piece)[start : start + len(rows.logprobs)]
        assert rows.start == without.start
        assert rows.logprobs.shape == without.logprobs.shape == expected.shape
        worst = max(worst, float((rows.logprobs - expected).abs().max()))
        moved = max(moved, float((without.logprobs - expected).abs().max()))
    # hqq rounds in fp32, where now and then one of many numbers at 8 bits gets the next code.
    assert worst <= {8: 5e-3, 4: 2e-5, 2: 2e-5}[bits]
    assert moved >= {8: 2e-2, 4: 0.1, 2: 0.5}[bits]


def test_the_search_is_only_there_when_asked_for(exact: Any) -> None:
    """With it what is read together decides about each."""
    asked = Quantization("hqq", 4, 64, RESIDUAL)
    rng = random.Random(2)
    sequences = [some_ids(rng, 40) for _ in range(4)]
    moved = {}
    for search in (False, True):
        scorer = PieceScorer(exact, replace(asked, search=search), 4096, 0)
        together = list(scorer.score(sequences, [30] * 4, []))
        alone = [next(scorer.score([ids], [30], [])) for ids in sequences]
        pairs = zip(together, alone, strict=True)
        moved[search] = max(float((a.logprobs - b.logprobs).abs().max()) for a, b in pairs)
    assert moved[False] <= 2e-5
    assert moved[True] > 1e-3


def test_rows_come_in_the_chunks_of_a_scorer_without_pieces(exact: Any) -> None:
    """The rows of a cell and of its baseline are compared in lockstep."""
    model = exact.float()
    asked = Quantization("hqq", 8, 64, 128)
    rng = random.Random(1)
    sequences = [some_ids(rng, length) for length in (1300, 20, 600)]
    for prefix, keep in (([], [1299, 3, 520]), (some_ids(rng, 70), [1300, 20, 100])):
        cuts = [
            [(each.sequence, each.start, len(each.logprobs)) for each in scorer]
            for scorer in (
                PieceScorer(model, asked, 4096, 0).score(sequences, keep, prefix),
                Scorer(model, 4096, True, 0).score(sequences, keep, prefix),
            )
        ]
        assert cuts[0] == cuts[1]
    exact.double()


@pytest.fixture
def cell(make_cell: MakeCell, tiny_random: Path) -> Callable[..., Cell]:
    """A cell with a cache: `cell("int4", cache_group_size=32)`."""

    def make(name: str, **options: Any) -> Cell:
        plain = make_cell(model=Model("random", str(tiny_random), None, False, False))
        own = replace(plain.runtime, options={**plain.runtime.options, **options})
        return replace(plain, runtime=own, kv_cache=KvCache(name, _kv_cache.INTENTS[name]))

    return make


def test_generation_decodes_through_the_cache(
    tiny_random: Path, cell: Callable[..., Cell], exact: Any
) -> None:
    """Padding in front of the shorter prompts changes nothing either."""
    asked = cell("int4", residual_length=6)
    engine = runtime.load(tiny_random, asked, "float32")
    engine._model.double()
    quantization = _kv_cache.wanted(asked)
    assert quantization is not None
    rng = random.Random(5)
    prompts = [some_ids(rng, length) for length in (30, 4, 17)]
    made = engine.generate(prompts, 12)
    moved = 0.0
    for prompt, each in zip(prompts, made, strict=True):
        ids = prompt + list(each.ids)
        rows = decoded(exact, quantization, ids, len(prompt))
        assert each.ids == tuple(rows[len(prompt) - 1 : -1].argmax(1).tolist())
        moved = max(moved, float((rows - decoded_exactly(exact, ids)).abs().max()))
    assert moved > 0.1


def decoded_exactly(model: Any, ids: Ids) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)


@pytest.mark.parametrize(("dtype", "float_bits"), [("float32", 32), ("bfloat16", 16)])
@pytest.mark.parametrize(
    ("name", "backend", "group"),
    [("int8", "hqq", 64), ("int4", "hqq", 32), ("int2", "hqq", 32), ("int2", "quanto", 64)],
)
def test_memory_is_that_of_codes_scales_and_zeros(
    tiny_random: Path,
    cell: Callable[..., Cell],
    name: str,
    backend: str,
    group: int,
    dtype: Dtype,
    float_bits: int,
) -> None:
    asked = cell(name, cache_backend=backend, cache_group_size=group)
    asked = replace(asked, runtime=replace(asked.runtime, speed_dtype=dtype))
    engine = runtime.load(tiny_random, asked, dtype)
    bits = asked.kv_cache.bits
    numbers = 2 * 2 * 2 * 64  # K and V, layers, heads, size
    assert engine.memory().kv_bytes_per_token == numbers * (bits + 2 * float_bits / group) / 8
    assert runtime.kv_bits(asked) == bits + 2 * float_bits / group
    (check,) = [each for each in engine.checks() if each.name == "kv_cache"]
    assert (check.ok, check.fatal) == (True, True)
    assert check.actual == f"tensors 4 of {bits} bits (loading)"
    seen = engine.observed()
    assert seen["kv_dtype"] == f"{name} ({backend})"
    assert seen["kv_cache"]["residual_length"] == 128
    assert "pieces of 64 tokens" in seen["kv_protocol"]


@pytest.mark.parametrize(("held", "told"), [(None, "32 bits"), (8, "8 bits")])
def test_a_cache_of_another_width_is_caught(
    tiny_random: Path,
    cell: Callable[..., Cell],
    monkeypatch: pytest.MonkeyPatch,
    held: int | None,
    told: str,
) -> None:
    """One of 32 bits under the name int4, and one whose library kept 8."""
    made = _kv_cache.for_decoding

    def wrong(model: Any, asked: Quantization) -> Any:
        return DynamicCache() if held is None else made(model, replace(asked, bits=held))

    monkeypatch.setattr(_kv_cache, "for_decoding", wrong)
    (check,) = [
        each
        for each in runtime.load(tiny_random, cell("int4"), "float32").checks()
        if each.name == "kv_cache"
    ]
    assert (check.ok, check.fatal) == (False, True)
    assert told in check.actual


def test_groups_of_one_token_by_library(tmp_path: Path, cell: Callable[..., Cell]) -> None:
    """A model of a single key-value head: hqq may have one group of 8 bits, quanto none of 4."""
    write_model(tmp_path, num_key_value_heads=1)
    here = Model("m", str(tmp_path), None, False, False)
    for name, options, told in (
        ("int8", {"cache_group_size": 64}, None),
        ("int4", {"cache_group_size": 64}, "2 groups or a multiple; set"),
        ("int4", {"cache_group_size": 64, "cache_backend": "quanto"}, "more than one group"),
        ("int4", {"cache_group_size": 32, "cache_backend": "quanto"}, None),
    ):
        refused = runtime.refusal(replace(cell(name, **options), model=here))
        assert (refused is None) if told is None else (told in str(refused))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("int8", {"cache_backend": "quanto"}, r"has: int4, int2.*`runtime.cache_backend=hqq`"),
        ("int4", {"cache_backend": "quanto", "cache_search": True}, r"`runtime.cache_search=true`"),
        ("int4", {"residual_length": 7}, r"`runtime.residual_length=7` should be even"),
        ("int4", {"cache_group_size": 48}, r"`runtime.cache_group_size=48`.*cache_group_size=64`"),
        ("int2", {"cache_group_size": 64}, r"leave a token 4 groups.*cache_group_size=32`"),
        ("int4", {"cache_group_size": 128}, r"should divide 64"),
    ],
)
def test_what_cannot_be_had_is_refused_before_any_work(
    cell: Callable[..., Cell], name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(runtime.refusal(cell(name, **options)))
    assert runtime.refusal(cell("int4")) is None


def test_refused_groups_fail_in_the_library(tiny_random: Path, cell: Callable[..., Cell]) -> None:
    """hqq 0.2.8 packs four rows of 2-bit codes into one: the reason of the refusal."""
    asked = cell("int2", cache_group_size=64)
    engine = runtime.load(tiny_random, asked, "float32")  # 8 tokens of 2 groups do pack
    with pytest.raises(RuntimeError, match="size of tensor"):
        engine.generate([[5, 6, 7]], 2)


def test_a_single_group_is_not_rounded_by_the_library() -> None:
    """Why quanto needs two groups a token (optimum-quanto 0.2.7)."""
    asked = Quantization("quanto", 4, 64, 128)
    number = torch.randn(1, 1, 2, 64, generator=torch.Generator().manual_seed(0))
    rounded = {}
    for tokens in (1, 2):
        layer = QuantoQuantizedLayer(asked.bits, 0, 0, asked.group_size, asked.residual_length)
        first = number[:, :, :tokens]
        layer.update(first, first)
        back, _ = layer.update(first[:, :, :1], first[:, :, :1])
        rounded[tokens] = float((back[:, :, :tokens] - first).abs().max())
    assert rounded[1] == 0
    assert rounded[2] > 0.05


def test_a_sliding_model_is_refused(tmp_path: Path, cell: Callable[..., Cell]) -> None:
    """By its config before any work, and by the loaded model."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, sliding_window=16,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    asked = replace(cell("int8"), model=Model("m", str(tmp_path), None, False, False))
    refused = runtime.refusal(asked)
    assert refused is not None
    assert "attention slides" in refused
    with pytest.raises(Unsupported, match="attention slides"):
        runtime.load(tmp_path, asked, "float32")
    assert runtime.refusal(replace(asked, kv_cache=KvCache("auto16", 16))) is None


def test_every_layer_counts_where_some_slide(tmp_path: Path, cell: Callable[..., Cell]) -> None:
    write_model(tmp_path)
    asked = replace(cell("int8"), model=Model("m", str(tmp_path), None, False, False))
    path = tmp_path / "config.json"
    text = path.read_text()
    for more, slides in (
        ('"use_sliding_window": false, "sliding_window": 16', False),
        ('"layer_types": ["full_attention", "full_attention"], "sliding_window": 16', False),
        ('"layer_types": ["full_attention", "sliding_attention"]', True),
    ):
        path.write_text(text.replace("{", "{" + more + ",", 1))
        assert (runtime.refusal(asked) is not None) is slides


def test_baselines_have_no_cache_options(cell: Callable[..., Cell]) -> None:
    """Cells of several caches compare with one baseline."""
    several = [cell("int4"), cell("int2", cache_group_size=32)]
    several.append(cell("int4", cache_backend="quanto", cache_group_size=8, residual_length=32))
    several[0] = cell("int4", cache_backend="auto", cache_group_size=32, residual_length=128)
    bases = [baseline.of(each) for each in several]
    assert {base.kv_cache.name for base in bases} == {"auto16"}
    assert bases[0] == bases[2]
    assert bases[0].runtime.options["residual_length"] == 128
    assert registry.runtime("transformers").LOADS.kv_cache["cuda"] == (
        "auto16", "int8", "int4", "int2",
    )  # fmt: skip


def test_options_of_a_cache_change_nothing_without_one(
    planned: Callable[..., list[PlannedCell]],
) -> None:
    """All such choices are one cell, and a remark says so."""
    cells = planned(
        "method=none,rtn", "kv_cache=auto16,int4",
        "runtime.cache_backend=auto,quanto", "runtime.residual_length=64,128",
    )  # fmt: skip
    kinds = Counter((each.cell.method.name, each.cell.kv_cache.name) for each in cells)
    assert kinds == {(m, kv): n for m in ("none", "rtn") for kv, n in (("auto16", 1), ("int4", 4))}
    for each in cells:
        told = [note for note in each.notes if "change nothing with `kv_cache=auto16`" in note]
        assert bool(told) is (each.cell.kv_cache.name == "auto16")


@pytest.mark.slow
def test_fewer_bits_diverge_more(make_cell: MakeCell) -> None:
    """On the trained model, in prose of two windows: 16 bits < 8 < 4 < 2."""
    from transformers import AutoTokenizer

    text = (SLICES_DIR / "prose.txt").read_text(encoding="utf-8")[:12_000]
    windows = prose.cut(AutoTokenizer.from_pretrained(MODEL_DIR)(text)["input_ids"], 512)
    plain = make_cell(model=Model("tiny", "qgrid/tiny", None, False, False))
    options = {**plain.runtime.options, "cache_group_size": 32, "residual_length": 64}
    plain = replace(plain, runtime=replace(plain.runtime, options=options))
    reference = runtime.load(MODEL_DIR, plain, "float32")
    found = {}
    for name, bits in (("auto16", 16), *_kv_cache.INTENTS.items()):
        engine = runtime.load(MODEL_DIR, replace(plain, kv_cache=KvCache(name, bits)), "float32")
        tokens = prose.Tokens.empty(windows)
        prose.collect(tokens, windows, prose.rows(engine, windows), prose.rows(reference, windows))
        found[bits] = float(tokens.kl.mean())
    assert found[16] == 0
    assert found[8] < 1e-5
    assert 10 * found[8] < found[4] < found[2] / 10
