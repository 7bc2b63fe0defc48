"""Perplexity and KL divergence against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qgrid.contracts import InvalidEngine, Scores
from qgrid.measure import prose, quality
from qgrid.measure.encoding import Encoder
from qgrid.measure.prose import Tokens
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell, Job, Slices

MakeJob = Callable[..., Job]
WINDOW = prose.Windows(((1, 2, 3, 4),), 3)


def plain_perplexity(folder: Path, text: str, limit: int, context: int) -> float:
    """The gptq-N protocol as a loop that shares no code with qgrid."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :limit]
    means = []
    for i in range(ids.shape[1] // context):
        window = ids[:, i * context : (i + 1) * context]
        with torch.no_grad():
            logits = model(window).logits[:, :-1]
        loss = torch.nn.CrossEntropyLoss()(logits.flatten(0, 1), window[:, 1:].flatten())
        means.append(loss.double())
    return math.exp(torch.stack(means).mean())


def plain_second_half(folder: Path, text: str, limit: int, context: int) -> tuple[float, int]:
    """The llamacpp-N protocol as a loop: exp of the mean over the second halves; how many."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, return_tensors="pt").input_ids[0, :limit]
    losses = []
    for i in range(len(ids) // context):
        window = ids[i * context : (i + 1) * context]
        with torch.no_grad():
            logprobs = model(window[None]).logits[0].double().log_softmax(-1)
        for place in range(context // 2, context - 1):
            losses.append(-float(logprobs[place, window[place + 1]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("context", [128, 333])
def test_the_second_half_of_a_window_as_llama_cpp_scores_it(
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    make_job: MakeJob,
    slices: Slices,
    context: int,
) -> None:
    assert slices.prose is not None
    halves = replace(slices.prose, protocol="llamacpp")
    cell = make_cell(slices=Slices("prose", halves, {}), context=context)
    result = quality.measure(make_job("quality", cell, tiny_random))
    ppl = next(m for m in result.measurements if m.metric == "ppl")
    text = Path(slices.prose.path).read_text()
    expected, count = plain_second_half(tiny_random, text, 1000, context)
    assert ppl.value == pytest.approx(expected, rel=1e-4)
    assert ppl.n == count > 0
    assert count % (context - 1 - context // 2) == 0
    assert result.observed["ppl_protocol"] == f"llamacpp-{context}"


def test_llama_cpp_puts_bos_in_the_place_of_each_windows_first_token() -> None:
    windows = prose.cut(range(10, 20), 5, "llamacpp", bos=1)
    assert windows.ids == ((1, 11, 12, 13, 14), (1, 16, 17, 18, 19))
    assert windows.scored == 2
    assert prose.cut(range(10, 20), 5, bos=1).ids[1][0] == 15


@pytest.mark.parametrize("context", [128, 700])
def test_perplexity_equals_a_plain_loop(
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    make_job: MakeJob,
    slices: Slices,
    context: int,
) -> None:
    """Windows within a batch, and windows longer than a chunk."""
    only_prose = Slices("prose", slices.prose, {})
    assert slices.prose is not None
    job = make_job("quality", make_cell(slices=only_prose, context=context), tiny_random)
    result = quality.measure(job)
    found = {m.metric: m for m in result.measurements}
    text = Path(slices.prose.path).read_text()
    assert found["ppl"].value == pytest.approx(
        plain_perplexity(tiny_random, text, 1000, context), rel=1e-4
    )
    assert found["ppl"].n == (1000 // context) * (context - 1)
    assert result.observed["ppl_protocol"] == f"gptq-{context}"
    assert 0 < found["kld_floor"].value < 0.05


@pytest.fixture(scope="module")
def windows(encoder: Encoder, slices: Slices) -> prose.Windows:
    assert slices.prose is not None
    return prose.cut(encoder.prose(Path(slices.prose.path).read_text(), 1000), 128)


def test_a_model_against_itself_diverges_by_nothing(
    tiny_random: Path,
    engine: runtime.Transformers,
    make_cell: Callable[..., Cell],
    make_job: MakeJob,
    windows: prose.Windows,
) -> None:
    """Two loads and two forward passes of the same files."""
    cell = make_cell()
    job = make_job("quality", cell, tiny_random, tiny_random)
    tokens, how = quality.paired_tokens(
        job, runtime.load(tiny_random, cell, "float32"), windows, beside=True
    )
    found = {m.metric: m.value for m in prose.against_baseline(tokens)}
    assert abs(found["kld_mean"]) <= 1e-6
    assert abs(found["kld_max"]) <= 1e-6
    assert found["same_top_p"] == 1.0
    assert found["ln_ppl_ratio"] == pytest.approx(0.0, abs=1e-7)
    assert how == {"baseline_rows": "computed beside the cell"}


def test_divergence_equals_an_independent_computation(
    tiny_random: Path,
    noisy: Path,
    engine: runtime.Transformers,
    make_cell: Callable[..., Cell],
    windows: prose.Windows,
) -> None:
    tokens = Tokens.empty(windows)
    cell = runtime.load(noisy, make_cell(), "float32")
    prose.collect(tokens, windows, prose.rows(cell, windows), prose.rows(engine, windows))
    found = {m.metric: m for m in prose.against_baseline(tokens)}

    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tiny_random, noisy)
    ]
    ids = torch.tensor(windows.ids)
    with torch.no_grad():
        base, other = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in models)
    true = ids[:, 1:, None]
    kl = torch.nn.functional.kl_div(other, base, log_target=True, reduction="none").sum(-1)
    p, q = (x.gather(2, true)[..., 0] for x in (base, other))
    expected = {
        "kld_mean": kl.mean(),
        "kld_p99": kl.flatten().quantile(0.99),
        "kld_max": kl.max(),
        "same_top_p": (base.argmax(-1) == other.argmax(-1)).double().mean(),
        "delta_p_mean": (q.exp() - p.exp()).mean(),
        "delta_p_rms": (q.exp() - p.exp()).square().mean().sqrt(),
        "ln_ppl_ratio": (p - q).mean(),
    }
    for metric, value in expected.items():
        assert found[metric].value == pytest.approx(float(value), rel=1e-4, abs=1e-6), metric
    per_window = kl.mean(1).numpy()
    stderr = per_window.std(ddof=1) / math.sqrt(len(windows))
    assert found["kld_mean"].stderr == pytest.approx(stderr, rel=1e-4)
    assert found["kld_mean"].value > 1e-3


def test_rows_kept_on_disk_give_the_same_within_their_floor(
    tiny_random: Path,
    noisy: Path,
    make_cell: Callable[..., Cell],
    make_job: MakeJob,
    windows: prose.Windows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forced, and with room for two windows at a time, so that models take turns."""
    from qgrid.measure import row_cache

    cell = make_cell()
    job = make_job("quality", cell, noisy, tiny_random)
    loads: list[Path] = []
    real = runtime.load

    def counted(artifact: Path, *rest: object) -> runtime.Transformers:
        loads.append(artifact)
        return real(artifact, *rest)  # type: ignore[arg-type]

    beside, _ = quality.paired_tokens(job, real(noisy, cell, "float32"), windows, beside=True)
    monkeypatch.setattr(runtime, "load", counted)
    monkeypatch.setattr(row_cache, "CACHE_BYTES", 2 * 2 * 127 * 512)
    apart, how = quality.paired_tokens(job, real(noisy, cell, "float32"), windows, beside=False)
    assert loads == [tiny_random, noisy] * math.ceil(len(windows) / 2)
    assert np.array_equal(beside.nll, apart.nll)
    assert np.abs(beside.kl - apart.kl).max() < 1e-3
    assert 0 < how["kld_cache_floor"] < 1e-6
    assert how["baseline_rows"] == "cached in float16"


def test_too_little_prose_says_what_to_do() -> None:
    with pytest.raises(prose.TooShort, match=r"`context=128` .* has 100; lower `context`"):
        prose.cut(range(100), 128)


def test_the_tail_is_dropped() -> None:
    assert [len(window) for window in prose.cut(range(300), 128).ids] == [128, 128]


def test_nan_is_invalid_and_never_a_score() -> None:
    tokens = Tokens.empty(WINDOW)
    rows = Scores(0, 1, torch.full((3, 8), float("nan")))
    with pytest.raises(InvalidEngine, match="NaN"):
        prose.collect(tokens, WINDOW, iter([rows]), None)


def test_a_baseline_that_computes_nan_is_invalid() -> None:
    tokens = Tokens.empty(WINDOW)
    cell, base = (Scores(0, 1, torch.full((3, 8), value)) for value in (-2.0, float("nan")))
    with pytest.raises(InvalidEngine, match="divergence from the baseline is NaN"):
        prose.collect(tokens, WINDOW, iter([cell]), iter([base]))


def test_a_missing_chunk_is_invalid() -> None:
    tokens = Tokens.empty(WINDOW)
    rows = Scores(0, 1, torch.zeros((2, 8)))
    with pytest.raises(InvalidEngine, match="NaN"):
        prose.collect(tokens, WINDOW, iter([rows]), None)


def test_engines_out_of_step_are_invalid() -> None:
    tokens = Tokens.empty(WINDOW)
    cell, base = Scores(0, 1, torch.zeros((3, 8))), Scores(0, 1, torch.zeros((3, 9)))
    with pytest.raises(InvalidEngine, match="different tokens or vocabulary"):
        prose.collect(tokens, WINDOW, iter([cell]), iter([base]))


def test_bos_is_explicit(tiny_random: Path, tmp_path: Path) -> None:
    """The tokenizer adds none here; one that adds it has it counted once, in front."""
    import shutil

    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    plain = Encoder(tiny_random)
    assert plain.bos is None
    assert plain.prose("red blue", None) == plain.text("red blue")
    folder = tmp_path / "model"
    shutil.copytree(tiny_random, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<|user|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    leading = Encoder(folder)
    assert leading.bos == tokenizer.bos_token_id
    assert leading.prose("red blue", None) == [leading.bos, *plain.text("red blue")]
    assert leading.prompts(["red"], chat=False) == [[leading.bos, *plain.text("red")]]
