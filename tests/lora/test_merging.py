"""Adapters applied for real: trained on the embedded model, merged, quantized, kept beside NF4."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qgrid import demo, environment, registry
from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.files import HashCache
from qgrid.lora import adapters, merging
from qgrid.measure import quality
from qgrid.methods import _checkpoint
from qgrid.planning import baseline
from qgrid.types import Cell, Job, Model, Slices, StageResult
from qgrid.weights import artifacts
from qgrid.weights.artifacts import BadArtifact
from tests import adapters as made

pytestmark = pytest.mark.slow
PLAIN = Model("tiny", "qgrid/tiny", None, False, False)
IDS = tuple(range(40, 88))
Make = Callable[..., Cell]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained on the 16-bit weights."""
    return made.train(tmp_path_factory.mktemp("adapter") / "taught")


@pytest.fixture(scope="module")
def taught_nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained on NF4 weights."""
    return made.train(tmp_path_factory.mktemp("adapter") / "taught_nf4", quantized=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def build(store: Path, make_cell: Make) -> Callable[[Model, str, int], tuple[Job, StageResult]]:
    """Make an artifact, or find it again."""

    def run(of: Model, method: str, bits: int) -> tuple[Job, StageResult]:
        native = {"format": method} if method == "gptq" else {}
        job = made.job(make_cell, store, of, method, bits, **native)
        result = artifacts.build(job)
        assert [check for check in result.checks if check.fatal and not check.ok] == []
        assert [
            c for c in result.checks if c.name.startswith(("adapter", "reload")) and not c.ok
        ] == []
        return job, result

    return run


Build = Callable[[Model, str, int], tuple[Job, StageResult]]


@pytest.fixture(scope="module")
def right(
    tmp_path_factory: pytest.TempPathFactory, build: Build
) -> Callable[[Model, str, int], float]:
    """The share of the taught questions that a cell answers right."""
    slices: Slices = made.slices(tmp_path_factory.mktemp("slices"))

    def run(of: Model, method: str, bits: int) -> float:
        job, _ = build(of, method, bits)
        cell = replace(job.planned.cell, slices=slices)
        out = tmp_path_factory.mktemp("out")
        asked = replace(job, stage="quality", planned=replace(job.planned, cell=cell), out=str(out))
        found = quality.measure(asked).measurements
        return next(each.value for each in found if each.metric == "accuracy")

    return run


Right = Callable[[Model, str, int], float]


def reference(change: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Logits of a plain fp32 model whose decoder layers have these weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(change(name, module.weight))
    return _checkpoint.logits(model, IDS)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of logits, as a share of the largest."""
    return float((one - other).abs().max() / other.abs().max())


# --- merging -------------------------------------------------------------------------------------


def test_merged_weights_are_base_plus_product_rounded_once(
    taught: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, result = build(made.model(taught), "none", 16)
    folder = Path(job.artifact)
    weights, added = load_file(folder / "model.safetensors"), made.low_rank(taught)
    base = load_file(demo.MODEL_DIR / "model.safetensors")
    assert len(added) == 15  # q, v and down of five layers
    assert weights.keys() == base.keys()
    for name, stored in weights.items():
        delta = added.get(name.removesuffix(".weight"))
        if delta is None:
            assert torch.equal(stored, base[name])
            continue
        exact = base[name].double() + delta
        off = (stored.double() - exact).abs()
        assert float((off / exact.abs().clamp(min=1e-3)).max()) < 2**-8  # half a step of bf16
    assert {"adapter_merged", "adapter_effect", "reload"} <= {c.name for c in result.checks}
    assert [path.name for path in folder.iterdir() if not path.exists()] == []  # no link hangs
    assert not (folder / "model.safetensors").is_symlink()
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    manifest = artifacts.load_manifest(folder)
    assert "peft" in manifest.versions
    assert manifest.model.adapter == str(taught)
    cache = HashCache(folder.parents[1] / "hashes.json")
    again = artifacts.verify(folder, job.planned, cache, full=True)
    assert all(check.ok for check in again)
    pins = dict(environment.locked_versions("main")) | {"peft": "0.0.1"}
    monkeypatch.setattr(environment, "locked_versions", lambda *_: pins)
    noted = [check for check in artifacts.verify(folder, job.planned, cache) if not check.ok]
    assert [check.name for check in noted] == ["environment"]
    assert "peft" in noted[0].actual


def test_merged_is_what_peft_computes_beside(taught: Path, make_cell: Make, tmp_path: Path) -> None:
    """In fp32: before rounding nothing but the order of additions differs."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32).eval()
    beside = _checkpoint.logits(PeftModel.from_pretrained(base, str(taught)).eval(), IDS)
    added = made.low_rank(taught)
    summed = reference(lambda name, w: (w.double() + added[name]).float() if name in added else w)
    assert apart(summed, beside) < 1e-5
    found = merging.merge(make_cell(model=made.model(taught)), demo.MODEL_DIR, tmp_path)
    told = float(found.checks[0].actual.removesuffix(" apart"))
    assert told < 1e-5 * float(beside.abs().max())
    assert apart(beside, reference(lambda _, w: w)) > 0.1  # and the adapter does something


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers\.0\..*v_proj": 3}},
        {"layers_to_transform": [0, 2]},
        {"target_modules": "all-linear"},
    ],
)
def test_what_an_adapter_may_say_means_what_peft_means(
    changes: dict[str, Any], make_cell: Make, tmp_path: Path
) -> None:
    """By an adapter of random numbers, as PEFT saves it and loads it again by itself."""
    from peft import PeftModel

    folder = made.train(tmp_path / "random", steps=0, init_lora_weights=False, **changes)
    cell, artifact = make_cell(model=made.model(folder)), tmp_path / "artifact"
    into = tmp_path / "into"
    for each in (artifact, into):
        each.mkdir()
    (artifact / adapters.FOLDER).symlink_to(folder)
    base = _checkpoint.load_16bit(demo.MODEL_DIR, PLAIN, dtype=torch.float32)
    own = _checkpoint.logits(PeftModel.from_pretrained(base, str(folder)).eval(), IDS)
    model = _checkpoint.load_16bit(demo.MODEL_DIR, PLAIN, dtype=torch.float32)
    before = _checkpoint.logits(model, IDS)
    merging.attach(model, artifact, "none", "float32")
    assert apart(_checkpoint.logits(model, IDS), own) < 1e-6
    assert apart(before, own) > 0.01
    found = merging.merge(cell, demo.MODEL_DIR, into)
    assert all(check.ok for check in found.checks)
    merged = _checkpoint.load_16bit(into, PLAIN, dtype=torch.float32)
    assert apart(_checkpoint.logits(merged, IDS), own) < 0.2 * apart(before, own)  # rounded


def test_a_wide_base_is_merged_without_rounding(
    taught: Path, make_cell: Make, tmp_path: Path
) -> None:
    base = tmp_path / "wide"
    base.mkdir()
    _checkpoint.copy_tokenizer(demo.MODEL_DIR, base)
    config = json.loads((demo.MODEL_DIR / "config.json").read_text()) | {"dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    stored = load_file(demo.MODEL_DIR / "model.safetensors")
    save_file({name: each.float() for name, each in stored.items()}, base / "model.safetensors")
    into = tmp_path / "into"
    into.mkdir()
    of = made.model(taught, id=str(base), adapter_base="16bit")  # the same weights, other bytes
    merging.merge(make_cell(model=of), base, into)
    weights, added = load_file(into / "model.safetensors"), made.low_rank(taught)
    for name, delta in added.items():
        exact = stored[f"{name}.weight"].double() + delta
        assert float((weights[f"{name}.weight"].double() - exact).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("method", "bits", "band"),
    # Normal weights, relative: NF4 in blocks of 64 about 0.09; int4 in groups of 128 about 0.11,
    # Q8_0 in blocks of 32 about 0.005. The embedded model's weights are near to normal.
    [("rtn", 4, (0.08, 0.14)), ("nf4", 4, (0.07, 0.11)), ("gguf", 8, (0.003, 0.008))],
)
def test_methods_quantize_the_merged_weights(
    method: str, bits: int, band: tuple[float, float], taught: Path, build: Build
) -> None:
    job, result = build(made.model(taught), method, bits)
    assert "adapter_merged" in {check.name for check in result.checks}
    added, base = made.low_rank(taught), load_file(demo.MODEL_DIR / "model.safetensors")
    weight = _from_gguf(job) if method == "gguf" else _from_layers(job)
    near, far = [], []
    for layer, delta in added.items():
        if layer.endswith("q_proj"):  # whose rows GGUF stores in another order
            continue
        merged = base[f"{layer}.weight"].double() + delta
        near.append(float((weight(layer) - merged).norm() / merged.norm()))
        far.append(float((weight(layer) - merged + delta).norm() / merged.norm()))
    assert band[0] < np.mean(near) < band[1]
    assert np.mean(far) > 1.5 * np.mean(near)


def _from_layers(job: Job) -> Callable[[str], torch.Tensor]:
    """Weights as a layer multiplies by them: what it makes of the unit vectors."""
    engine = registry.runtime("transformers").load(Path(job.artifact), job.planned.cell, "float32")
    model: Any = vars(engine)["_model"]

    def weight(layer: str) -> torch.Tensor:
        module = model.get_submodule(layer)
        with torch.inference_mode():
            weights: torch.Tensor = module(torch.eye(module.in_features)).T.double()
        return weights

    return weight


def _from_gguf(job: Job) -> Callable[[str], torch.Tensor]:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    names = {"self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down"}
    tensors = {each.name: each for each in GGUFReader(Path(job.artifact) / "model.gguf").tensors}

    def weight(layer: str) -> torch.Tensor:
        number, _, part = layer.removeprefix("model.layers.").partition(".")
        stored = tensors[f"blk.{number}.{names[part]}.weight"]
        return torch.from_numpy(dequantize(stored.data, stored.tensor_type)).double()

    return weight


def test_quality_moves_as_it_was_trained(taught: Path, taught_nf4: Path, right: Right) -> None:
    before = right(PLAIN, "none", 16)
    assert before < 0.5
    for adapter in (taught, taught_nf4):
        for mode, method, bits in (
            ("merged", "none", 16),
            ("merged", "nf4", 4),
            ("attached", "nf4", 4),
        ):
            after = right(made.model(adapter, mode), method, bits)  # type: ignore[arg-type]
            assert after > before + 0.3, (adapter.name, mode, method)
        assert right(made.model(adapter), "none", 16) >= 0.9


# --- beside the weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "bits"),
    [("none", 16), ("nf4", 4), ("fp4", 4), ("int8", 8), ("quanto", 8), ("gptq", 4)],
)
def test_an_attached_adapter_adds_its_product(
    method: str, bits: int, taught: Path, build: Build
) -> None:
    job, result = build(made.model(taught, "attached"), method, bits)
    folder, cell = Path(job.artifact), job.planned.cell
    alone = replace(cell, model=PLAIN)
    runtime = registry.runtime("transformers")
    live, without = (runtime.load(folder, each, "float32") for each in (cell, alone))
    model: Any = vars(live)["_model"]
    added = made.low_rank(taught)
    generator = torch.Generator().manual_seed(0)
    for layer, delta in added.items():
        module = model.get_submodule(layer)
        rows = torch.randn(4, delta.shape[1], generator=generator)
        with torch.inference_mode():
            found = module(rows) - module.base_layer(rows)
        wanted = (rows.double() @ delta.T).float()
        assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    size = sum(each.numel() for each in load_file(taught / adapters.WEIGHTS).values())
    more = _held(live) - _held(without)
    assert abs(more - 4 * size) <= 256  # fp32; padding of a library's own tensors aside
    seen = live.observed()
    assert [each.name for each in live.checks() if each.ok][:1] == ["adapter_product"]
    assert seen["computes_in"]["float32"] >= 2 * len(added)
    assert sum(live.kernels().values()) == 35 + 1 + 2 * len(added)  # no layer is counted twice
    values = {each.metric: each.value for each in result.measurements}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert values["size_on_disk_bytes"] == sum(path.stat().st_size for path in files)
    assert folder / "adapter" / adapters.WEIGHTS in files
    weights = [path for path in files if path.suffix == ".safetensors"]
    stored = sum(
        each.numel() * each.itemsize for path in weights for each in load_file(path).values()
    )
    base = sum(each.numel() for each in load_file(demo.MODEL_DIR / "model.safetensors").values())
    assert values["bits_per_weight"] == 8 * stored / base
    assert "adapter_finite" in {check.name for check in result.checks}


def _held(engine: Any) -> int:
    memory = engine.memory()
    assert memory is not None
    return int(memory.weights_bytes)


def test_attached_nf4_is_the_dequantized_base_plus_the_product(
    taught_nf4: Path, build: Build
) -> None:
    job, _ = build(made.model(taught_nf4, "attached"), "nf4", 4)
    folder, cell = Path(job.artifact), job.planned.cell
    stored, added = load_file(folder / "model.safetensors"), made.low_rank(taught_nf4)

    def weight(name: str, plain: torch.Tensor) -> torch.Tensor:
        codes, absmax, table, outer, steps, state = (
            stored[f"{name}.weight{part}"]
            for part in (
                "", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
                ".quant_state.bitsandbytes__nf4",
            )
        )  # fmt: skip
        told = json.loads(bytes(state.tolist()))
        scales = steps[absmax.long()].reshape(-1) * outer.repeat_interleave(256)[: len(absmax)]
        places = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten().long()
        values = table[places].reshape(-1, 64) * (scales + told["nested_offset"])[:, None]
        whole: torch.Tensor = values.reshape(plain.shape).double() + added.get(name, 0.0)
        return whole.float()

    engine = registry.runtime("transformers").load(folder, cell, "float32")
    live = _checkpoint.logits(vars(engine)["_model"], IDS)
    assert apart(live, reference(weight)) < 1e-5
    assert len(engine.generate([[40, 41, 42], [43]], 4)[0].ids) == 4


def test_what_was_kept_is_checked_before_every_use(
    taught: Path, make_cell: Make, tmp_path: Path
) -> None:
    job = made.job(make_cell, tmp_path, made.model(taught, "attached"), "nf4", 4)
    artifacts.build(job)
    folder, cache = Path(job.artifact), HashCache(tmp_path / "hashes.json")
    assert all(each.ok for each in artifacts.verify(folder, job.planned, cache))
    path = folder / "adapter" / adapters.WEIGHTS
    stored = load_file(path)
    name = next(name for name in stored if "lora_B" in name)
    save_file(stored | {name: stored[name] + 1}, path)
    failed = [each for each in artifacts.verify(folder, job.planned, cache) if not each.ok]
    assert [each.name for each in failed] == ["files"]
    assert "adapter/adapter_model.safetensors" in failed[0].actual
    save_file({k: v for k, v in stored.items() if "layers.0.self_attn.q_proj" not in k}, path)
    config = json.loads((folder / "adapter" / adapters.CONFIG).read_text())
    assert "q_proj" in config["target_modules"]
    engine = registry.runtime("transformers").load(folder, job.planned.cell, "float32")
    wrapped = [m for m in vars(engine)["_model"].modules() if hasattr(m, "base_layer")]
    assert len(wrapped) == 14  # the tensors decide, not the configuration's names


def test_numbers_that_are_none_are_caught(taught: Path, make_cell: Make, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(taught, tmp_path / "bad")
    stored = load_file(folder / adapters.WEIGHTS)
    name = next(iter(stored))
    save_file(stored | {name: stored[name] * float("nan")}, folder / adapters.WEIGHTS)
    job = made.job(make_cell, tmp_path, made.model(folder, "attached"), "nf4", 4)
    with pytest.raises(BadArtifact, match="adapter_finite"):
        artifacts.build(job)
    with pytest.raises(ValueError, match="NaN"):
        artifacts.build(made.job(make_cell, tmp_path, made.model(folder), "none", 16))


def test_an_adapter_that_was_never_trained_is_flagged(make_cell: Make, tmp_path: Path) -> None:
    folder = made.train(tmp_path / "idle", steps=0)
    job = made.job(make_cell, tmp_path, made.model(folder), "none", 16)
    failed = [each for each in artifacts.build(job).checks if not each.ok]
    assert [(each.name, each.fatal) for each in failed] == [("adapter_effect", False)]


def test_what_does_not_fit_is_refused_at_the_build_as_well(make_cell: Make, tmp_path: Path) -> None:
    folder = made.write(tmp_path / "a", demo.MODEL_DIR, {"r": 3})
    for mode in ("merged", "attached"):
        of = made.model(folder, mode)
        with pytest.raises(Unsupported, match="matrices of rank 2 and 2"):
            artifacts.build(made.job(make_cell, tmp_path, of, "nf4", 4))


def test_layers_that_are_not_wrapped_are_an_invalid_engine(
    taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    whole = peft.LoraConfig

    def forgetful(**arguments: Any) -> Any:
        return whole(**arguments | {"target_modules": arguments["target_modules"][1:]})

    monkeypatch.setattr(peft, "LoraConfig", forgetful)
    model = _checkpoint.load_16bit(demo.MODEL_DIR, PLAIN)
    artifact = taught.parent / "artifact"
    artifact.mkdir()
    (artifact / adapters.FOLDER).symlink_to(taught)
    with pytest.raises(InvalidEngine, match=r"adapter has 15 layers and 14 are wrapped"):
        merging.attach(model, artifact, "none", "float32")


def test_baseline_of_what_is_attached_is_merged(taught: Path, make_cell: Make) -> None:
    cell = make_cell(model=made.model(taught, "attached"), bits=4)
    assert baseline.of(cell).model == made.model(taught)
