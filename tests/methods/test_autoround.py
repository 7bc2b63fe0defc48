"""AutoRound in the formats that it is exported to, decoded without the libraries."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qgrid import artifacts, inspection, registry
from qgrid.gguf import blocks, convert, quantization
from qgrid.methods import autoround
from qgrid.runtimes import llama_cpp
from qgrid.runtimes import transformers as runtime
from qgrid.types import Calibration, Cell, Method, Model, Runtime
from tests import jobs
from tests.methods import unpacking
from tests.runtimes.passes import plain

pytestmark = pytest.mark.slow
DEMO = Path(__file__).parents[2] / "qgrid" / "demo"


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


@dataclass(frozen=True)
class Made:
    """A checkpoint of the trained model, its decoded weights, and what a runtime makes of it."""

    weights: dict[str, torch.Tensor]  # of linear layers, fp64
    cell: Cell
    folder: Path

    def logprobs(self) -> torch.Tensor:
        loaded = runtime.load(self.folder, self.cell, "float32")
        ids = _ids()
        found = next(loaded.score([ids], [len(ids) - 1])).logprobs.double()
        loaded.close()
        return found


@pytest.fixture(scope="module")
def made(
    make_cell: Callable[..., Cell], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Made]:
    """Quantize the trained model once: `made("autoround", 4, iters=20)`."""
    known: dict[Any, Made] = {}
    drawn = Calibration(
        "t", "package:qgrid.demo/slices/calibration.jsonl", None, None, "train", "text", 8, 64
    )

    def run(method: str, bits: int, **changes: Any) -> Made:
        key = (method, bits, *changes.items())
        if key not in known:
            folder = tmp_path_factory.mktemp(method)
            cell = make_cell(
                model=Model("demo", str(DEMO / "model"), None, False, False),
                method=Method(method, jobs.options(method, **changes)),
                bits=bits,
                calibration=drawn,
            )
            registry.method(method).quantize(cell, DEMO / "model", folder)
            known[key] = Made(_weights(folder, bits), cell, folder)
        return known[key]

    return run


def _weights(folder: Path, bits: int) -> dict[str, torch.Tensor]:
    stored = inspection.inspect(folder).format
    if stored == "gguf":
        return {}
    return _packed(folder, bits) if stored == "pack-quantized" else unpacking.weights(folder)


def _packed(folder: Path, bits: int) -> dict[str, torch.Tensor]:
    """Symmetric weights of compressed-tensors: each row a stream of codes, little end first."""
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name in [each for each in stored if each.endswith(".weight_packed")]:
        layer = name.removesuffix(".weight_packed")
        rows, columns = stored[f"{layer}.weight_shape"].tolist()
        words = stored[name].numpy().astype(np.uint32)
        stream = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
        stream = stream.reshape(rows, -1)[:, : columns * bits].reshape(rows, columns, bits)
        codes = (stream.astype(np.int64) << np.arange(bits)).sum(-1) - 2 ** (bits - 1)
        scale = stored[f"{layer}.weight_scale"].double()
        spread = scale.repeat_interleave(columns // scale.shape[1], 1)
        found[layer] = torch.from_numpy(codes) * spread
    return found


def _model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()


def _ids() -> list[int]:
    from transformers import AutoTokenizer

    text = (DEMO / "slices" / "prose.txt").read_text()[:4000]
    return list(AutoTokenizer.from_pretrained(DEMO / "model")(text)["input_ids"][:500])


def _apart(weight: torch.Tensor, original: torch.Tensor) -> float:
    return float((weight - original.double()).norm() / original.double().norm())


def _kld(base: torch.Tensor, other: torch.Tensor) -> float:
    return float((base.exp() * (base - other)).sum(-1).mean())


TUNED = {"group_size": 32, "iters": 10}


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_weights_are_at_most_a_step_from_the_original(
    layout: str, made: Callable[..., Made]
) -> None:
    """Learned roundings: each weight goes to one of its two neighbours, RTN to the nearer.

    RTN of 32 normal weights to 4 bits errs by step / sqrt(12), 8 to 9 % of them; the further
    neighbour for some of them, and clipped ends, make up to half as much again.
    """
    before = load_file(DEMO / "model" / "model.safetensors")
    found = made("autoround", 4, format=layout, **TUNED).weights
    assert len(found) == 35
    errors = [_apart(weight, before[f"{name}.weight"]) for name, weight in found.items()]
    assert min(errors) > 0.075
    assert max(errors) < 0.13


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_loaded_model_computes_the_decoded_weights(layout: str, made: Callable[..., Made]) -> None:
    found = made("autoround", 4, format=layout, **TUNED)
    model = _model()
    with torch.no_grad():
        for name, weight in found.weights.items():
            model.get_submodule(name).weight.copy_(weight)
    expected = plain(model, _ids())[:-1].double()
    assert float((found.logprobs() - expected).abs().max()) < 1e-3


def test_learned_roundings_are_better_than_nearest_ones(made: Callable[..., Made]) -> None:
    """What AutoRound is for, on text that it has not seen."""
    base = plain(_model(), _ids())[:-1].double()
    rounded = _kld(base, made("rtn", 2, group_size=32).logprobs())
    learned = _kld(base, made("autoround", 2, **TUNED).logprobs())
    four = _kld(base, made("autoround", 4, format="compressed-tensors", **TUNED).logprobs())
    assert four < learned < 0.8 * rounded


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


def test_gguf_runs_and_is_about_as_near_as_the_file_of_llama_cpp(
    made: Callable[..., Made], tmp_path: Path
) -> None:
    """The same types, the same bits: only the roundings of the linear layers differ.

    Ten steps are noise at 4 bits: 0.0023 against 0.0017 (0.0012 after 16 steps of twice the text).
    A permuted or shifted layer costs whole nats.
    """
    tuned = made("autoround", 4, format="gguf", **TUNED)
    llama = Runtime("llama_cpp", "float32", "float32", 1, _runtime_options())
    cell = replace(tuned.cell, runtime=llama)
    folder = tmp_path / "rounded"
    folder.mkdir()
    convert.convert(DEMO / "model", tmp_path / "whole.gguf", "BF16")
    quantization.quantize(tmp_path / "whole.gguf", folder / "model.gguf", "Q4_0")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / name, folder / name)
    base, ids = plain(_model(), _ids())[:-1].double(), _ids()

    def apart(place: Path) -> float:
        loaded = llama_cpp.load(place, cell, "float32")
        found = next(loaded.score([ids], [len(ids) - 1])).logprobs.double()
        loaded.close()
        return _kld(base, found)

    assert 0.5 < apart(tuned.folder) / apart(folder) < 2


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
    job = jobs.job(make_cell, tmp_path, tiny_random, "autoround", 2, iters=16, group_size=32)
    cell = job.planned.cell
    assert cell.calibration is not None
    other = replace(cell, calibration=replace(cell.calibration, samples=4))
    stored = []
    for number, each in enumerate((cell, cell, other)):
        out = tmp_path / str(number)
        out.mkdir()
        autoround.quantize(each, tiny_random, out)
        stored.append((out / "model.safetensors").read_bytes())
    assert stored[0] == stored[1]
    assert stored[0] != stored[2]
