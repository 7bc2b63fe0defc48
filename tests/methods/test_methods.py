"""Every method at every width on a real model: bits as derived, coverage, exact reload."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec, models, registry
from qgrid.contracts import Built, Unsupported
from qgrid.files import HashCache
from qgrid.methods import _checkpoint, _packed
from qgrid.planning import estimate, plan
from qgrid.types import Cell, Method, StageResult
from qgrid.weights import artifacts
from qgrid.weights.artifacts import BadArtifact
from tests import jobs

OWN = ("none", "rtn", "gptq", "awq", "nf4", "int8", "smoothquant", "fp8")
WIDTHS = [(m, b) for m in OWN for b in registry.method(m).SUPPORTS.bits]
CODES = {"rtn": 0.126, "gptq": 0.126, "awq": 0.126, "none": 0.0}  # scales and shape above the width

Build = Callable[..., StageResult]


@pytest.fixture
def build(tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]) -> Build:
    """Build an artifact: `build("gptq", 4, group_size=64)`."""

    def run(method: str, bits: int, model: Path = tiny_random, **changes: Any) -> StageResult:
        return artifacts.build(jobs.job(make_cell, tmp_path, model, method, bits, **changes))

    return run


@pytest.mark.parametrize(("method", "bits"), WIDTHS)
def test_every_width_is_what_it_says(method: str, bits: int, build: Build) -> None:
    result = build(method, bits)
    assert all(check.ok for check in result.checks), result.checks
    assert result.observed["module_methods"] == {method: 14}
    assert result.observed["format"] == registry.method(method).SUPPORTS.produces[bits]
    stored = next(m.value for m in result.measurements if m.metric == "linear_bits_per_weight")
    if method in CODES:
        assert stored == pytest.approx(bits + CODES[method], abs=0.002)
    else:
        assert bits < stored < bits + 0.3


@pytest.mark.parametrize("method", ["none", "rtn", "nf4", "int8"])
def test_artifact_is_verified_without_its_base_model(
    method: str,
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    width = registry.method(method).SUPPORTS.default_bits
    job = jobs.job(make_cell, tmp_path, tiny_random, method, width)
    artifacts.build(job)
    monkeypatch.setattr(models, "located", lambda _: None)
    cache = HashCache(tmp_path / "hashes.json")
    checks = artifacts.verify(Path(job.artifact), job.planned, cache, full=True)
    assert all(check.ok for check in checks), checks
    jobs.swap_tokenizer(Path(job.artifact))
    jobs.rewrite_manifest(Path(job.artifact))
    after = artifacts.verify(Path(job.artifact), job.planned, cache)
    assert [check.name for check in after if not check.ok] == ["tokenizer"]


@pytest.mark.parametrize(
    ("method", "bits", "changes"),
    [
        ("rtn", 3, {"symmetric": False}),
        ("rtn", 2, {"group_size": None, "symmetric": False}),
        ("rtn", 8, {"group_size": 32}),
        ("rtn", 4, {"scheme": "W4A16_ASYM"}),
        ("gptq", 4, {"group_size": None, "activation_order": "weight"}),
        ("gptq", 3, {"activation_order": None, "symmetric": False}),
        ("awq", 4, {"symmetric": False, "duo_scaling": False}),
        ("awq", 8, {"symmetric": False}),
        ("nf4", 4, {"double_quant": False}),
        ("int8", 8, {"threshold": 0.0}),
    ],
)
def test_options_store_what_is_derived(
    method: str, bits: int, changes: dict[str, Any], build: Build
) -> None:
    result = build(method, bits, **changes)
    assert all(check.ok for check in result.checks), result.checks


def test_calibration_is_in_the_manifest(build: Build, tmp_path: Path) -> None:
    build("gptq", 4)
    folder = next(path for path in (tmp_path / "artifacts").iterdir() if path.is_dir())
    told = artifacts.load_manifest(folder).calibration
    assert told is not None
    assert (told["samples"], told["length"], told["seed"]) == (8, 64, 0)
    assert len(told["sha256"]) == 64


def test_layers_that_gptq_left_to_rounding_are_named(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompressor.modifiers.gptq import base

    real = base.quantize_weight

    def unfit(hessians: Any, **arguments: Any) -> Any:
        return real(hessians=hessians * float("nan"), **arguments)

    monkeypatch.setattr(base, "quantize_weight", unfit)
    with pytest.raises(BadArtifact, match=r"check `method`.*layers.0.*by rtn"):
        build("gptq", 4)


def test_none_links_a_16_bit_checkpoint(build: Build, tmp_path: Path, tiny_random: Path) -> None:
    build("none", 16)
    weights = next((tmp_path / "artifacts").glob("*/model.safetensors"))
    assert weights.is_symlink()
    assert weights.resolve() == (tiny_random / "model.safetensors").resolve()


def test_none_converts_a_32_bit_checkpoint(build: Build, tmp_path: Path, tiny_random: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    wide = tmp_path / "wide"
    AutoModelForCausalLM.from_pretrained(tiny_random, dtype=torch.float32).save_pretrained(wide)
    _checkpoint.copy_tokenizer(tiny_random, wide)
    result = build("none", 16, model=wide)
    assert result.observed["stored_dtypes"].keys() == {"BF16"}
    assert {check.name: check.ok for check in result.checks}["reload"]


def test_nf4_stores_the_very_codes_and_scales(
    build: Build, tmp_path: Path, tiny_random: Path
) -> None:
    """The trap of bitsandbytes on a CPU: the first forward rounds the scales, for good.

    Saved later, the files agree with the model in memory, so only the base weights can tell.
    """
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file

    build("nf4", 4, double_quant=False)
    stored = load_file(next((tmp_path / "artifacts").glob("*/model.safetensors")))
    base = load_file(tiny_random / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    codes, state = quantize_4bit(base[name], quant_type="nf4", blocksize=64)
    assert stored[name].equal(codes)
    assert stored[f"{name}.absmax"].equal(state.absmax)


def test_group_that_does_not_divide_is_refused_with_two_ways_out(build: Build) -> None:
    with pytest.raises(Unsupported) as error:
        build("rtn", 4, group_size=96)
    said = str(error.value)
    assert "`method.group_size=96` does not divide the columns of 14 layers" in said
    assert "model.layers.0.mlp.down_proj (512 columns)" in said
    assert "`method.group_size=128`" in said
    assert "`method.group_size=null`" in said


def test_plan_can_ask_before_any_work(
    tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    method: Any = registry.method("gptq")
    known = jobs.job(make_cell, tmp_path, tiny_random, "gptq", 4, group_size=96)
    assert "does not divide" in method.refusal(known.planned.cell)
    unknown = jobs.job(make_cell, tmp_path, Path("/nowhere"), "gptq", 4, group_size=96)
    assert method.refusal(unknown.planned.cell) is None
    good = jobs.job(make_cell, tmp_path, tiny_random, "gptq", 4)
    assert method.refusal(good.planned.cell) is None


def test_quantized_source_is_refused(build: Build, tmp_path: Path) -> None:
    build("rtn", 4)
    folder = next(path for path in (tmp_path / "artifacts").iterdir() if path.is_dir())
    with pytest.raises(Unsupported, match=r"already quantized \(compressed-tensors\)"):
        build("rtn", 8, model=folder)


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq"])
def test_scheme_implies_a_width(name: str) -> None:
    method: Any = registry.method(name)
    assert method.option_bits(jobs.options(name)) is None
    assert method.option_bits(jobs.options(name, scheme="W3A16")) == 3


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("rtn", {"scheme": "W4A4"}, r"scheme=\"W4A4\"` should be .*'W4A16_ASYM'"),
        ("gptq", {"group_size": 0}, "group_size=0` should be greater than 0"),
        ("awq", {"grid_points": "many"}, "grid_points"),
        ("int8", {"threshold": -1.0}, "threshold"),
        ("nf4", {"double": True}, "double` is not a known key"),
    ],
)
def test_wrong_option_is_one_sentence(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(codec.InvalidValue, match=message):
        codec.convert(registry.method(method).Options, jobs.options(method, **changes))


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16", "W4A16", "W8A16", "W4A16_ASYM"])
def test_schemes_are_those_of_compressed_tensors(scheme: str) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme

    preset = preset_name_to_scheme(scheme, ["Linear"]).weights
    bits = _packed.option_bits(jobs.options("rtn", scheme=scheme))
    assert bits is not None
    ours = _packed.weights(bits, jobs.options("rtn", scheme=scheme))
    assert (ours.bits, ours.group_size, ours.symmetric) == (
        preset.num_bits,
        preset.group_size,
        preset.symmetric,
    )


@pytest.mark.parametrize(
    ("method", "bits", "changes", "published"),
    [
        ("awq", 4, {"symmetric": False}, 4.15625),
        ("gptq", 4, {}, 4.125),
        ("nf4", 4, {"double_quant": False}, 4.5),
        ("nf4", 4, {}, 4.127),
        ("int8", 8, {}, 8.0078),
    ],
)
def test_planned_bits_are_the_published_ones(
    method: str,
    bits: int,
    changes: dict[str, Any],
    published: float,
    make_cell: Callable[..., Cell],
) -> None:
    cell = make_cell(method=Method(method, jobs.options(method, **changes)), bits=bits)
    sizes = estimate.Architecture(32, 4096, 32, 8, 128, 14336, 128256, tied=False)
    planned = 8 * plan._weight_bytes(cell, sizes) - 16 * sizes.other_weights
    assert planned / sizes.linear_weights == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize("method", OWN)
def test_yaml_gives_every_option_and_no_other(method: str) -> None:
    fields = {field.name for field in dataclasses.fields(registry.method(method).Options)}
    assert jobs.options(method).keys() == fields


def test_importing_methods_imports_no_library() -> None:
    names = [f"qgrid.methods.{name}" for name in OWN]
    code = (
        f"import importlib, json, sys; [importlib.import_module(n) for n in {names!r}]\n"
        "import qgrid.weights.artifacts, qgrid.calibration\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'llmcompressor', 'datasets'}"
        " & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_method_of_ones_own_needs_no_exact_bits(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    real: Any = registry.method("rtn")
    kept = {name: getattr(real, name) for name in ("SUPPORTS", "Options")}

    def quantize(cell: Cell, source: Path, out: Path) -> Built:
        built: Built = real.quantize(cell, source, out)
        return dataclasses.replace(built, reference=None)

    monkeypatch.setattr(registry, "method", lambda _: SimpleNamespace(**kept, quantize=quantize))
    checks = {check.name: check for check in build("rtn", 4).checks}
    assert checks["bits"].ok
    assert not checks["reload"].ok
    assert not checks["reload"].fatal


@pytest.mark.parametrize(
    ("method", "bits"), [("none", 16), ("gptq", 4), ("awq", 4), ("nf4", 4), ("int8", 8)]
)
def test_another_architecture(method: str, bits: int, build: Build, qwen: Path) -> None:
    result = build(method, bits, model=qwen)
    assert all(check.ok for check in result.checks), result.checks
    assert result.observed["module_methods"] == {method: 14}
    assert "F16" in result.observed["stored_dtypes"]
