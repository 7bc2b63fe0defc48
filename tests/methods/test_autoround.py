"""AutoRound in the formats that it is exported to, decoded without the libraries."""

from __future__ import annotations

import gc
import itertools
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qgrid.gguf import blocks, convert, quantization
from qgrid.methods import autoround
from qgrid.runtimes import llama_cpp
from qgrid.types import Cell, Runtime
from qgrid.weights import artifacts, inspection
from tests import jobs
from tests.methods import checkpoints, decoding, unpacking
from tests.methods.checkpoints import CALIBRATION, MODEL, Made

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("bits", "changes", "stored"),
    [
        (2, {"group_size": 32}, "pack-quantized"),
        (3, {}, "pack-quantized"),
        (4, {}, "pack-quantized"),
        (8, {"group_size": None}, "pack-quantized"),
        (4, {"keep": {"model.layers.0.*": 8, "model.layers.1.mlp.*": 16}}, "pack-quantized"),
        (2, {"format": "gptq", "group_size": 64}, "gptq"),
        (3, {"format": "gptq"}, "gptq"),
        (4, {"format": "gptq", "group_size": None}, "gptq"),
        (8, {"format": "gptq"}, "gptq"),
        (4, {"format": "awq"}, "awq"),
        (4, {"format": "awq", "symmetric": False, "group_size": 64}, "awq"),
    ],
)
def test_checkpoint_is_what_it_says(
    bits: int,
    changes: dict[str, Any],
    stored: str,
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    job = jobs.job(make_cell, tmp_path, tiny_random, "autoround", bits, iters=2, **changes)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    assert {"reload", "bits", "coverage", "calibration_rows"} <= {c.name for c in result.checks}
    assert result.observed["format"] == stored
    kept = 3 if "keep" in changes else 0
    assert result.observed["module_methods"]["autoround"] == 14 - kept
    folder = Path(job.artifact)
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".json") == [
        "chat_template.jinja",
        "model.safetensors",
    ]
    assert list(here.iterdir()) == []
    contents = inspection.inspect(folder)
    assert len(contents.modules) == 14  # without the base model's shapes
    scales = {t.dtype for name, t in contents.tensors.items() if "scale" in name}
    assert scales == {"BF16" if stored == "pack-quantized" else "F16"}  # as their readers have them


# --- truth: the trained model, decoded without the libraries -------------------------------------


TUNED: dict[str, Any] = {
    "group_size": 32,
    "iters": 10,
    "calibration": replace(CALIBRATION, length=64),
}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of linear layers, decoded by hand, fp64."""
    packed = inspection.inspect(folder).format == "pack-quantized"
    return decoding.weights(folder) if packed else unpacking.weights(folder)


def _apart(weight: torch.Tensor, original: torch.Tensor) -> float:
    return float((weight - original.double()).norm() / original.double().norm())


LAYOUTS = ["compressed-tensors", "gptq", "awq"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_at_most_a_step_from_the_original(layout: str, made: Made) -> None:
    """Learned roundings: each weight goes to one of its two neighbours, RTN to the nearer.

    RTN of 32 normal weights to 4 bits errs by step / sqrt(12), 8 to 9 % of them; the further
    neighbour for some of them, and clipped ends, make up to half as much again.
    """
    before = load_file(MODEL / "model.safetensors")
    found = _weights(made("autoround", 4, format=layout, **TUNED)[0])
    assert len(found) == 35
    errors = [_apart(weight, before[f"{name}.weight"]) for name, weight in found.items()]
    assert min(errors) > 0.075
    assert max(errors) < 0.13


def test_native_formats_hold_the_same_weights(made: Made) -> None:
    """One tuning, to the bit. In compressed-tensors scales are bf16, and so is what was tuned."""
    first, second = (
        _weights(made("autoround", 4, format=layout, **TUNED)[0]) for layout in ("gptq", "awq")
    )
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loaded_model_computes_the_decoded_weights(layout: str, made: Made) -> None:
    """The kernel of `awq` multiplies in fp16, also here."""
    checkpoint = made("autoround", 4, format=layout, **TUNED)
    found = checkpoints.scored(checkpoint)[0].double()
    expected = checkpoints.computed(_weights(checkpoint[0])).double()
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1e-5
    assert float((found - expected).abs().max()) < (0.1 if layout == "awq" else 1e-3)


def test_learned_roundings_are_better_than_nearest_ones(made: Made) -> None:
    """What AutoRound is for, on text that it has not seen."""

    def apart(method: str, bits: int, **changes: Any) -> float:
        return checkpoints.divergence(checkpoints.scored(made(method, bits, **changes))[0])

    learned = apart("autoround", 2, **TUNED)
    assert apart("autoround", 4, **TUNED) < learned < 0.8 * apart("rtn", 2, group_size=32)


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "kind", "stored"), [(4, "Q4_0", 4.5), (8, "Q8_0", 8.5)])
def test_gguf_types_hold_the_tuned_weights(
    bits: int,
    kind: str,
    stored: float,
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
) -> None:
    changes = {"format": "gguf", "group_size": 32, "iters": 2}
    job = jobs.job(make_cell, tmp_path, tiny_random, "autoround", bits, **changes)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    assert {"types", "tokenizer", "bits", "calibration_rows"} <= {c.name for c in result.checks}
    assert result.observed["format"] == "gguf"
    assert result.observed["module_methods"] == {"autoround": 14}
    contents = inspection.inspect(Path(job.artifact), tiny_random)
    assert {state.format for state in contents.modules.values()} == {kind}
    assert contents.linear_bits_per_weight == stored
    assert sorted(path.name for path in Path(job.artifact).glob("*.gguf")) == ["model.gguf"]


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_stored_as_they_are(bits: int, tmp_path: Path, tiny_random: Path) -> None:
    """Against a checkpoint of the same weights that was converted without rounding."""
    shapes = inspection.decoder_linears(inspection.read_headers(tiny_random))
    chance, most = np.random.default_rng(0), 2 ** (bits - 1)
    found = {
        name: blocks.Codes(
            chance.integers(-most, most, shape, dtype=np.int8),
            chance.normal(size=(shape[0], shape[1] // 32)).astype(np.float16),
        )
        for name, shape in shapes.items()
    }
    convert.convert(tiny_random, tmp_path / "whole.gguf", "BF16")
    quantization.quantize(tmp_path / "whole.gguf", tmp_path / "made.gguf", blocks.TYPES[bits])
    blocks.write(tmp_path / "made.gguf", tiny_random, bits, found)
    exact = tmp_path / "exact"
    shutil.copytree(tiny_random, exact)
    weights = load_file(exact / "model.safetensors")
    for name, codes in found.items():
        wide = codes.values * codes.scales.astype(np.float32).repeat(32, 1)
        weights[f"{name}.weight"] = torch.from_numpy(wide)
    save_file(weights, exact / "model.safetensors", metadata={"format": "pt"})
    convert.convert(exact, tmp_path / "exact.gguf", "F32")
    made, wanted = _decoded(tmp_path / "made.gguf"), _decoded(tmp_path / "exact.gguf")
    names = [name for name in wanted if name.startswith("blk.") and "norm" not in name]
    assert len(names) == 14
    for name in names:
        assert np.array_equal(made[name], wanted[name]), name


def test_gguf_holds_the_librarys_codes_and_runs(made: Made) -> None:
    """Those of the same tuning in `gptq`, to the bit; llama.cpp would round to others."""
    folder, cell = made("autoround", 4, format="gguf", **TUNED)
    tuned = _weights(made("autoround", 4, format="gptq", **TUNED)[0])
    before, found = load_file(MODEL / "model.safetensors"), _decoded(folder / "model.gguf")
    others = []
    places = {  # queries and keys lie in another order of rows
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer, (ours, theirs) in itertools.product(range(5), places.items()):
        name = f"model.layers.{layer}.{ours}"
        stored = torch.from_numpy(found[f"blk.{layer}.{theirs}.weight"])
        assert torch.equal(stored.double(), tuned[name]), name
        kind = gguf.GGMLQuantizationType.Q4_0
        own = gguf.dequantize(gguf.quantize(before[f"{name}.weight"].float().numpy(), kind), kind)
        others.append(not np.array_equal(own, found[f"blk.{layer}.{theirs}.weight"]))
    assert sum(others) > len(others) / 2  # a block may be best as it was rounded first
    llama = Runtime("llama_cpp", "float32", "float32", 1, _runtime_options())
    ids = list(checkpoints.ids())
    loaded = llama_cpp.load(folder, replace(cell, runtime=llama), "float32")
    scores = next(loaded.score([ids], [len(ids) - 1])).logprobs
    loaded.close()
    assert checkpoints.divergence(scores) < 0.02  # a permuted or shifted layer costs whole nats


def _runtime_options() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((jobs.CONF / "runtime" / "llama_cpp.yaml").read_text())
    return {key: values[key] for key in llama_cpp.Options.__dataclass_fields__}


def _decoded(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """By the reference decoder of the format."""
    tensors = gguf.GGUFReader(path).tensors
    return {each.name: gguf.dequantize(each.data, each.tensor_type) for each in tensors}


@pytest.mark.parametrize(
    ("bits", "changes", "message"),
    [
        (4, {"symmetric": False}, r"`method.symmetric=false` cannot be exported .*format=awq"),
        (4, {"format": "gptq", "keep": {"model.layers.0.*": 8}}, r"`method.keep` is not there"),
        (
            4,
            {"format": "gguf"},
            r"has groups of 32 without zero points; set `method.group_size=32`",
        ),
        (4, {"group_size": 96}, r"`method.group_size=96` does not divide"),
    ],
)
def test_what_the_library_does_not_export_is_refused_before_any_work(
    bits: int,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, "autoround", bits, **changes)
    assert re.search(message, str(autoround.refusal(job.planned.cell)))


def test_another_text_than_the_calibration_fails_the_check() -> None:
    drawn = [(1, 2), (3, 4)]
    assert autoround._check_rows([(1, 2), (3, 4), (1, 2)], drawn).ok
    assert autoround._check_rows([(1, 2)], drawn).actual == "1 of 2"
    foreign = autoround._check_rows([(1, 2), (3, 4), (5, 6)], drawn)
    assert (foreign.ok, foreign.fatal, foreign.actual) == (False, True, "2 of 2 and 1 others")


def test_build_is_the_same_to_the_bit_and_depends_on_its_text(
    tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, "autoround", 2, iters=4, group_size=32)
    cell = job.planned.cell
    assert cell.calibration is not None
    other = replace(cell, calibration=replace(cell.calibration, samples=4))
    stored, frozen = [], gc.get_freeze_count()
    for number, each in enumerate((cell, cell, other)):
        out = tmp_path / str(number)
        out.mkdir()
        autoround.quantize(each, tiny_random, out)
        stored.append((out / "model.safetensors").read_bytes())
    assert stored[0] == stored[1]
    assert stored[0] != stored[2]
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, frozen)
