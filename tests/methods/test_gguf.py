"""`method=gguf`: each type is what it says, and no planted fault gets past the audit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest

from qgrid import codec, registry
from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.gguf import convert, file, layers, quantization
from qgrid.gguf.types import FILE_TYPES
from qgrid.methods import gguf
from qgrid.types import Cell, StageResult
from qgrid.weights import artifacts, inspection
from qgrid.weights.artifacts import BadArtifact
from tests import jobs
from tests.conftest import write_model, write_tokenizer
from tests.gguf.rewriting import Tensors, rewritten
from tests.methods.gguf_jobs import job, named, options

Build = Callable[..., StageResult]
MIXED = {"Q3_K_M": {"Q3_K", "Q4_K", "Q5_K"}, "Q4_K_M": {"Q4_K", "Q6_K"}, "Q2_K": {"Q2_K", "Q3_K"}}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of hidden size 320, which no K-quant's block of 256 divides."""
    folder = tmp_path_factory.mktemp("wide")
    write_model(folder, hidden_size=320)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def build(tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]) -> Build:
    """Build an artifact: `build(4, type="Q4_0")`."""

    def run(bits: int, model: Path = tiny_random, **changes: Any) -> StageResult:
        return artifacts.build(job(make_cell, tmp_path, model, bits, **changes))

    return run


# --- what is made --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILE_TYPES))
def test_every_type_is_what_it_says(name: str, build: Build) -> None:
    kind = FILE_TYPES[name]
    result = build(kind.bits, type=name, imatrix=kind.needs_imatrix)
    assert all(check.ok for check in result.checks if check.fatal), result.checks
    assert result.observed["format"] == "gguf"
    made = {"none": 14} if kind.bits == 16 else {"gguf": 14}
    assert result.observed["module_methods"] == made
    assert kind.base in result.observed["tensor_types"]
    stored = next(m.value for m in result.measurements if m.metric == "linear_bits_per_weight")
    assert kind.bits <= stored < kind.bits + 2
    assert {"types", "gguf_tokenizer", "gguf_tokenizer_boundaries"} <= named(result.checks).keys()
    assert ("logits" in named(result.checks)) == (kind.bits == 16)


@pytest.mark.parametrize(
    ("bits", "name"), [(int(bits), name) for bits, name in jobs.options("gguf")["types"].items()]
)
def test_bits_alone_mean_the_yamls_type(bits: int, name: str) -> None:
    by_bits = gguf.resolved(bits, options())
    by_type = gguf.resolved(bits, options(type=name))
    assert by_bits == by_type == options(type=name) | {"types": {}}
    assert gguf.option_bits(by_bits) == bits == FILE_TYPES[name].bits


def test_file_says_what_was_made_and_keeps_config_and_tokenizer(
    build: Build, tmp_path: Path, tiny_random: Path
) -> None:
    build(4)
    folder = next(path for path in (tmp_path / "artifacts").iterdir() if path.is_dir())
    held = {path.name for path in folder.iterdir()}
    assert held == {
        "manifest.json",
        "model.gguf",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    for name in held - {"manifest.json", "model.gguf"}:
        assert (folder / name).read_bytes() == (tiny_random / name).read_bytes()
    manifest = artifacts.load_manifest(folder)
    assert manifest.tensor_types == file.read(folder / "model.gguf").histogram()
    assert manifest.calibration is None


def test_modules_have_the_checkpoints_names_and_true_types(
    build: Build, tmp_path: Path, tiny_random: Path
) -> None:
    build(4)
    folder = next(path for path in (tmp_path / "artifacts").iterdir() if path.is_dir())
    contents = inspection.inspect(folder, tiny_random, "gguf")
    base = inspection.inspect(tiny_random)
    assert contents.modules.keys() == base.modules.keys()
    assert contents.num_parameters == base.num_parameters
    stored = {t.name: t for t in reference.GGUFReader(folder / "model.gguf").tensors}
    for module, tensor in layers.places(tiny_random).items():
        state = contents.modules[module]
        assert state.format == stored[tensor].tensor_type.name
        assert state.bits == 8 * stored[tensor].n_bytes / base.modules[module].num_weights
    alone = inspection.inspect(folder, None, "gguf")
    assert (alone.modules, alone.num_parameters) == (contents.modules, contents.num_parameters)
    assert contents.bits_per_weight == pytest.approx(
        8 * sum(t.n_bytes for t in stored.values()) / base.num_parameters
    )


def test_weights_are_the_checkpoints(build: Build, tmp_path: Path, tiny_random: Path) -> None:
    from safetensors.torch import load_file

    build(8)
    path = next((tmp_path / "artifacts").glob("*/model.gguf"))
    stored = {t.name: t for t in reference.GGUFReader(path).tensors}
    base = load_file(tiny_random / "model.safetensors")
    tensor = stored["blk.1.ffn_down.weight"]
    weights = base["model.layers.1.mlp.down_proj.weight"].float().numpy()
    decoded = reference.dequantize(tensor.data, tensor.tensor_type)
    assert np.linalg.norm(decoded - weights) < 0.007 * np.linalg.norm(weights)


def test_importance_comes_from_the_calibration_text_and_changes_the_file(
    build: Build, tmp_path: Path
) -> None:
    plain, weighted = build(4), build(4, imatrix=True)
    assert plain.observed["tensor_types"] == weighted.observed["tensor_types"]
    folders = [path for path in (tmp_path / "artifacts").iterdir() if path.is_dir()]
    manifests = [artifacts.load_manifest(folder) for folder in folders]
    drawn = [m.calibration for m in manifests if m.calibration is not None]
    assert [(d["samples"], d["length"]) for d in drawn] == [(8, 64)]
    assert len({m.files["model.gguf"] for m in manifests}) == 2


def test_embedded_model_needs_no_fallback(make_cell: Callable[..., Cell], tmp_path: Path) -> None:
    from qgrid import demo

    for kind in FILE_TYPES.values():
        wanted = job(make_cell, tmp_path, demo.MODEL_DIR, kind.bits, type=kind.name, imatrix=True)
        assert gguf.mismatch(wanted.planned.cell) is None
        assert gguf.refusal(wanted.planned.cell) is None


# --- options -------------------------------------------------------------------------------------


def test_16_bit_forms_are_one_artifact_whatever_else_is_asked() -> None:
    asked = options(imatrix=True, accept_fallback=True)
    assert gguf.resolved(16, asked) == gguf.UNQUANTIZED
    assert codec.plain(codec.convert(gguf.Options, dict(gguf.UNQUANTIZED))) == gguf.UNQUANTIZED


def test_only_the_importance_matrix_needs_the_calibration_text() -> None:
    assert gguf.calibrates(gguf.resolved(4, options(imatrix=True)))
    assert not gguf.calibrates(gguf.resolved(4, options()))
    assert not gguf.calibrates(gguf.resolved(16, options(imatrix=True)))


@pytest.mark.parametrize(
    ("bits", "changes", "message"),
    [
        (2, {"type": "IQ2_XS"}, r"needs an importance matrix; set `method\.imatrix=true`"),
        (5, {"types": {4: "Q4_0"}}, "`method.types` has no type for `bits=5`"),
        (4, {"types": {4: "Q8_0"}}, "`method.type=Q8_0` is a type of 8 bits, not `bits=4`"),
    ],
)
def test_refusal_says_what_to_do(
    bits: int,
    changes: dict[str, Any],
    message: str,
    make_cell: Callable[..., Cell],
    tmp_path: Path,
    tiny_random: Path,
) -> None:
    planned = job(make_cell, tmp_path, tiny_random, bits, **changes).planned
    assert re.search(message, str(gguf.refusal(planned.cell)))


def test_unknown_architecture_is_refused_by_name(
    make_cell: Callable[..., Cell], tmp_path: Path, tiny_random: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_random, folder)
    cell = job(make_cell, tmp_path, folder, 4).planned.cell
    assert gguf.refusal(cell) is None  # and is looked at again when the checkpoint has changed
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["PhiForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "PhiForCausalLM" in str(gguf.refusal(cell))
    assert gguf.mismatch(cell) is None
    with pytest.raises(Unsupported, match="PhiForCausalLM"):
        gguf.quantize(cell, folder, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"type": "Q4_K"}, "'Q4_K_M'"), ({"types": {4: "Q4"}}, "types"), ({"imatrix": 1}, "imatrix")],
)
def test_wrong_option_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(codec.InvalidValue, match=message):
        options(**changes)


# --- rows that are no whole blocks ---------------------------------------------------------------


def test_misfit_is_told_before_quantizing_as_the_dry_run_would(
    wide: Path, make_cell: Callable[..., Cell], tmp_path: Path
) -> None:
    cell = job(make_cell, tmp_path, wide, 4).planned.cell
    said = str(gguf.mismatch(cell))
    convert.convert(wide, tmp_path / "f16.gguf", "F16")
    planned = quantization.plan_types(tmp_path / "f16.gguf", "Q4_K_M")
    fallen = {
        module: planned[tensor]
        for module, tensor in layers.places(wide).items()
        if planned[tensor] not in FILE_TYPES["Q4_K_M"].mix
    }
    assert set(fallen.values()) == {"Q5_0", "Q8_0"}
    assert f"the rows of {len(fallen)} linear layers" in said
    for module, stored in list(fallen.items())[:3]:
        assert f"{module} (320 columns) would become {stored}" in said
    assert "`method.type=Q4_0`" in said or "`method.type=IQ4_NL`" in said
    assert "`method.accept_fallback=true`" in said
    with pytest.raises(InvalidEngine, match="320 columns"):
        gguf.quantize(cell, wide, tmp_path)
    assert not (tmp_path / "model.gguf").exists()


def test_suggested_type_fits(wide: Path, build: Build) -> None:
    result = build(4, wide, type="IQ4_NL")
    assert all(check.ok for check in result.checks if check.fatal)


def test_accepted_fallback_is_built_and_shown(wide: Path, build: Build) -> None:
    result = build(4, wide, accept_fallback=True)
    told = named(result.checks)["types"]
    assert not told.ok
    assert not told.fatal
    assert "Q5_0" in told.actual
    assert "is Q5_0" in told.actual
    assert result.observed["tensor_types"]["Q5_0"] > 0
    stored = next(m.value for m in result.measurements if m.metric == "linear_bits_per_weight")
    assert stored > 5


def test_accepted_layers_may_even_stay_at_16_bits(
    tmp_path: Path, make_cell: Callable[..., Cell]
) -> None:
    """Rows of 500 weights fit no block at all."""
    odd = tmp_path / "odd"
    write_model(odd, intermediate_size=500)
    write_tokenizer(odd)
    asked = job(make_cell, tmp_path, odd, 8)
    assert "(500 columns) would become F16" in str(gguf.mismatch(asked.planned.cell))
    accepted = job(make_cell, tmp_path, odd, 8, accept_fallback=True)
    result = artifacts.build(accepted)
    told = named(result.checks)
    assert not told["coverage"].ok
    assert "model.layers.0.mlp.down_proj is F16" in told["types"].actual
    assert result.observed["module_methods"] == {"gguf": 12, "none": 2}


def test_libraries_own_dry_run_has_the_last_word(
    wide: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "mismatch", lambda _: None)
    with pytest.raises(InvalidEngine, match=r"llama\.cpp would store \d+ linear layers otherwise"):
        build(4, wide)


def test_other_weights_than_the_checkpoints_are_found(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right types and no NaN, but the feed-forward matrices of another layer."""
    true = quantization.quantize

    def swapped(source: Path, out: Path, *arguments: Any) -> dict[str, str]:
        def swap(tensors: Tensors) -> None:
            one, other = "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"
            tensors[one], tensors[other] = tensors[other], tensors[one]

        return true(rewritten(source, tmp_path / "swapped", change_tensors=swap), out, *arguments)

    monkeypatch.setattr(quantization, "quantize", swapped)
    with pytest.raises(BadArtifact, match=r"check `weights`.*ffn_up\.weight is 1\.\d"):
        build(4)


def test_importing_and_planning_load_no_library(tiny_random: Path) -> None:
    code = (
        "import sys\n"
        "from qgrid import registry\n"
        "module = registry.method('gguf')\n"
        "registry.method('prequantized')\n"
        "print(sorted({'torch', 'transformers', 'llama_cpp', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert registry.method("gguf").SUPPORTS.produces[4] == "gguf"
