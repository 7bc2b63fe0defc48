"""GPTQ and AWQ in their own checkpoint formats: what is stored, against what it was made from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qgrid import registry
from qgrid.files import HashCache
from qgrid.methods import _checkpoint
from qgrid.planning import legality
from qgrid.types import Cell, Method, StageResult
from qgrid.weights import artifacts, inspection
from qgrid.weights.artifacts import BadArtifact
from tests import jobs
from tests.methods import checkpoints, unpacking
from tests.methods.checkpoints import CALIBRATION, MODEL, Made

pytestmark = pytest.mark.slow
Build = Callable[..., StageResult]


@pytest.fixture
def build(tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]) -> Build:
    def run(method: str, bits: int, model: Path = tiny_random, **changes: Any) -> StageResult:
        changes = {"format": method, **changes}
        return artifacts.build(jobs.job(make_cell, tmp_path, model, method, bits, **changes))

    return run


@pytest.mark.parametrize(
    ("method", "bits", "changes"),
    [
        ("gptq", 2, {"activation_order": None}),
        ("gptq", 3, {"symmetric": False}),
        ("gptq", 4, {}),
        ("gptq", 4, {"symmetric": False, "group_size": 32}),
        ("gptq", 8, {"group_size": None}),
        ("gptq", 2, {"library": "optimum", "activation_order": None, "group_size": 64}),
        ("gptq", 3, {"library": "optimum", "activation_order": None, "symmetric": False}),
        ("gptq", 4, {"library": "optimum", "activation_order": None}),
        ("gptq", 8, {"library": "optimum", "activation_order": None, "group_size": None}),
        ("awq", 4, {}),
        ("awq", 4, {"symmetric": False, "group_size": 64}),
    ],
)
def test_checkpoint_is_what_it_says(
    method: str, bits: int, changes: dict[str, Any], build: Build, tmp_path: Path
) -> None:
    result = build(method, bits, **changes)
    assert all(check.ok for check in result.checks), result.checks
    assert {"reload", "tokenizer", "bits", "coverage"} <= {check.name for check in result.checks}
    assert result.observed["format"] == method
    assert result.observed["module_methods"] == {method: 14}
    folder = next(path for path in (tmp_path / "artifacts").iterdir() if path.is_dir())
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".json") == [
        "chat_template.jinja",
        "model.safetensors",
    ]
    alone, based = inspection.inspect(folder), result.measurements
    stored = next(m.value for m in based if m.metric == "linear_bits_per_weight")
    assert alone.linear_bits_per_weight == pytest.approx(stored)  # without the base model's shapes
    assert len(alone.modules) == 14


def test_nothing_is_written_where_the_user_stands(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    build("gptq", 4)
    assert list(here.iterdir()) == []


def test_build_is_the_same_to_the_bit(build: Build, tmp_path: Path, tiny_random: Path) -> None:
    from hashlib import sha256

    build("gptq", 4)
    first, *_ = (tmp_path / "artifacts").glob("*/model.safetensors")
    before = sha256(first.read_bytes()).hexdigest()
    for path in first.parent.iterdir():
        path.unlink()
    first.parent.rmdir()
    build("gptq", 4)
    assert sha256(first.read_bytes()).hexdigest() == before


def test_torn_and_swapped_native_checkpoints_are_caught(
    build: Build, tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    build("gptq", 4)
    job = jobs.job(make_cell, tmp_path, tiny_random, "gptq", 4, format="gptq")
    folder, cache = Path(job.artifact), HashCache(tmp_path / "hashes.json")
    assert all(check.ok for check in artifacts.verify(folder, job.planned, cache, full=True))
    jobs.unquantize(tiny_random)(folder)
    jobs.rewrite_manifest(folder)
    failed = {c.name for c in artifacts.verify(folder, job.planned, cache) if not c.ok}
    assert {"bits", "coverage"} <= failed


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layers_that_calibration_hardly_reaches_are_named(
    method: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptqmodel.utils import fallback

    monkeypatch.setattr(fallback, "should_use_fallback", lambda *_, **__: True)
    with pytest.raises(BadArtifact, match=r"check `method`.*layers.0.*by rtn"):
        build(method, 4)


def test_layers_that_gptq_only_rounds_are_named_through_transformers(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a Hessian cannot be factorized, in one layer."""
    from gptqmodel.quantization.gptq import GPTQ

    invert, calls = GPTQ.hessian_inverse, itertools.count()

    def failing(self: Any, hessian: Any) -> Any:
        return (None, 1.0) if next(calls) == 1 else invert(self, hessian)

    monkeypatch.setattr(GPTQ, "hessian_inverse", failing)
    result = build("gptq", 4, library="optimum", activation_order=None)
    assert result.observed["module_methods"] == {"gptq": 13, "rtn": 1}
    (check,) = [each for each in result.checks if each.name == "method"]
    assert not check.ok
    assert check.actual == "model.layers.0.self_attn.k_proj by rtn"


@pytest.mark.parametrize(
    ("method", "bits", "changes", "message"),
    [
        ("gptq", 4, {"block_size": 64}, r"`method.block_size=64` is not there .* \(has: 128\)"),
        ("gptq", 4, {"dampening": 1.5}, r"`method.dampening=1.5` .* less than 1"),
        ("gptq", 4, {"group_size": 96}, r"`method.group_size=96` .* \(has: 16, 32, 64, 128, null"),
        ("gptq", 4, {"library": "optimum"}, r"`method.activation_order=static` .* \(has: null\)"),
        ("gptq", 4, {"library": "llmcompressor"}, r"does not write .* \(has: gptqmodel, optimum\)"),
        ("awq", 4, {"grid_points": 10}, r"`method.grid_points=10` is not there .* \(has: 20\)"),
        ("awq", 4, {"duo_scaling": False}, r"`method.duo_scaling=false` .* \(has: true\)"),
    ],
)
def test_what_the_library_does_not_have_is_refused_before_any_work(
    method: str,
    bits: int,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, method, bits, format=method, **changes)
    module: Any = registry.method(method)
    said = module.refusal(job.planned.cell)
    assert said is not None
    assert re.search(message, said), said


def test_layers_that_do_not_pack_are_named(
    tmp_path: Path, make_cell: Callable[..., Cell], tiny_random: Path
) -> None:
    from tests.conftest import write_model

    folder = tmp_path / "odd"
    write_model(folder, intermediate_size=528, num_hidden_layers=1)  # 16.5 times 32
    _checkpoint.copy_tokenizer(tiny_random, folder)
    job = jobs.job(make_cell, tmp_path, folder, "gptq", 4, format="gptq", group_size=16)
    module: Any = registry.method("gptq")
    said = module.refusal(job.planned.cell)
    assert "packs 32 rows and columns together" in said
    assert "3 layers: model.layers.0.mlp.down_proj" in said


@pytest.mark.parametrize(("method", "bits"), [("awq", 8), ("awq", 3)])
def test_a_width_that_only_the_default_format_has(
    method: str, bits: int, make_cell: Callable[..., Cell]
) -> None:
    chosen = Method(method, jobs.options(method, format=method))
    support = registry.support(chosen)
    refused = legality._refused_width(make_cell(method=chosen, bits=bits), support)
    assert refused is not None
    assert "with these options has no" in refused.reason
    assert "(has: 4); its defaults have 2, 3, 4, 8" in refused.reason


# --- truth: the trained model, decoded without the libraries -------------------------------------


@dataclass(frozen=True)
class Decoded:
    """A checkpoint of the trained model, and what its decoded weights compute in fp32."""

    folder: Path
    weights: dict[str, torch.Tensor]  # of linear layers, fp64
    logprobs: torch.Tensor


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """The trained model's own linear weights, fp64."""
    found = checkpoints.dense().named_modules()
    return {n: m.weight.detach().double() for n, m in found if _is_decoder_linear(n, m)}


@pytest.fixture(scope="module")
def decoded(made: Made) -> Callable[..., Decoded]:
    """`decoded("gptq", 4, format="gptq")`, each once."""
    known: dict[Path, Decoded] = {}

    def run(method: str, bits: int, **changes: Any) -> Decoded:
        folder, _ = made(method, bits, **changes)
        if folder not in known:
            known[folder] = _decoded(folder)
        return known[folder]

    return run


def _is_decoder_linear(name: str, module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and ".layers." in name


def _decoded(folder: Path) -> Decoded:
    """A native checkpoint by its bits; one of compressed-tensors as its library unpacks it."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    if inspection.inspect(folder).format == "pack-quantized":
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        logprobs = _logprobs(model)
        found = model.named_modules()
        weights = {n: m.weight.detach().double() for n, m in found if _is_decoder_linear(n, m)}
        return Decoded(folder, weights, logprobs)
    weights = unpacking.weights(folder)
    stored, model = load_file(folder / "model.safetensors"), checkpoints.dense()
    kept = {name: value for name, value in stored.items() if name in model.state_dict()}
    linears = {f"{name}.weight": value for name, value in weights.items()}
    model.load_state_dict({**kept, **linears}, strict=False)
    return Decoded(folder, weights, _logprobs(model))


def _logprobs(model: Any) -> torch.Tensor:
    """Of some prose, `(tokens, vocab)`, fp64."""
    ids = _prose()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor(ids)).logits
    return logits.double().log_softmax(-1).flatten(0, 1)


def _prose() -> list[list[int]]:
    from transformers import AutoTokenizer

    text = (checkpoints.DEMO / "slices" / "prose.txt").read_text()[:20000]
    ids = AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]
    return [ids[start : start + 200] for start in range(0, 1200, 200)]


def _kld(base: torch.Tensor, other: torch.Tensor) -> float:
    return float((base.exp() * (base - other)).sum(-1).mean())


def _apart(weights: torch.Tensor, original: torch.Tensor) -> float:
    return float((weights - original).norm() / original.norm())


@pytest.mark.parametrize(
    ("bits", "low", "high"), [(3, 0.22, 0.65), (4, 0.10, 0.30), (8, 0.006, 0.018)]
)
def test_weights_are_as_far_from_the_original_as_their_width_says(
    bits: int,
    low: float,
    high: float,
    decoded: Callable[..., Decoded],
    plain: dict[str, torch.Tensor],
) -> None:
    """Rounding a normal weight to steps of its group's range errs by step / sqrt(12).

    The largest of 128 normal weights is about 2.6 sigma, so a step is 2 x 2.6 sigma / (2**bits - 1)
    and the relative error 0.21, 0.10, 0.0059 at 3, 4, 8 bits: the lower end. GPTQ moves weights
    further on purpose, at most 3 times as far here: the upper end.
    """
    found = decoded("gptq", bits, format="gptq").weights
    assert found.keys() == plain.keys()
    errors = [_apart(found[name], plain[name]) for name in plain]
    assert low < min(errors)
    assert max(errors) < high


def test_outputs_are_nearer_than_by_rounding(
    decoded: Callable[..., Decoded], plain: dict[str, torch.Tensor]
) -> None:
    """What GPTQ is for: worse weights, better products, on inputs that it has not seen."""
    inputs: list[torch.Tensor] = []
    model = checkpoints.dense()
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].double()))
    _logprobs(model)
    given = inputs[0].flatten(0, 1)
    rounded = decoded("rtn", 4).weights[name]
    treated = decoded("gptq", 4, format="gptq").weights[name]
    assert _apart(treated, plain[name]) > _apart(rounded, plain[name])
    exact = given @ plain[name].T
    assert _apart(given @ treated.T, exact) < 0.9 * _apart(given @ rounded.T, exact)


def test_wider_is_nearer(decoded: Callable[..., Decoded]) -> None:
    base = _logprobs(checkpoints.dense())
    apart = [_kld(base, decoded("gptq", bits, format="gptq").logprobs) for bits in (2, 3, 4, 8)]
    assert apart == sorted(apart, reverse=True)
    assert all(wide < 0.5 * narrow for narrow, wide in itertools.pairwise(apart))
    assert apart[-1] < 1e-4


@pytest.mark.parametrize(
    ("library", "order"), [("gptqmodel", "static"), ("gptqmodel", None), ("optimum", None)]
)
def test_the_three_ways_of_gptq_agree(
    library: str,
    order: str | None,
    decoded: Callable[..., Decoded],
    plain: dict[str, torch.Tensor],
) -> None:
    """One algorithm, three libraries: equally far from the original, layer by layer.

    Each against llmcompressor with the same order of columns. Weight errors differ by less than 5 %
    (0.4 % on average), KL divergence from the 16-bit model by less than a factor of two: single
    codes differ where the libraries' sums round differently. gptqmodel does the arithmetic also
    under optimum, which leads to the same weights to the bit.
    """
    native = decoded("gptq", 4, format="gptq", library=library, activation_order=order)
    other = decoded("gptq", 4, activation_order=order)
    ratios = [
        _apart(native.weights[name], plain[name]) / _apart(other.weights[name], plain[name])
        for name in plain
    ]
    base = _logprobs(checkpoints.dense())
    assert all(0.95 < ratio < 1.05 for ratio in ratios)
    assert 0.99 < sum(ratios) / len(ratios) < 1.01
    assert 0.5 < _kld(base, native.logprobs) / _kld(base, other.logprobs) < 2
    if library == "optimum":
        direct = decoded("gptq", 4, format="gptq", library="gptqmodel", activation_order=order)
        assert all(torch.equal(native.weights[name], direct.weights[name]) for name in plain)


def test_awq_rounds_the_scaled_weights(
    decoded: Callable[..., Decoded], plain: dict[str, torch.Tensor]
) -> None:
    """Scales are folded into the norm before: with them, weights are 4-bit roundings of theirs.

    Queries and keys are not clipped, so that their error is that of rounding, 0.11; the search
    clips the rest where their products gain from it.
    """
    from safetensors.torch import load_file

    found = decoded("awq", 4, calibration=replace(CALIBRATION, samples=2), format="awq")
    before = load_file(MODEL / "model.safetensors")
    after = load_file(found.folder / "model.safetensors")
    norms = {"self_attn.q_proj": "input_layernorm", "mlp.up_proj": "post_attention_layernorm"}
    for layer in range(5):
        for part, norm in norms.items():
            name = f"model.layers.{layer}.{norm}.weight"
            scale = before[name].double() / after[name].double()
            assert float(scale.max() / scale.min()) > 1.1  # it did scale
            name = f"model.layers.{layer}.{part}"
            error = _apart(found.weights[name], plain[name] * scale)
            assert 0.08 < error < (0.14 if part == "self_attn.q_proj" else 0.4)
    assert _kld(_logprobs(checkpoints.dense()), found.logprobs) < 0.01
