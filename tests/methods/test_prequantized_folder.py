"""`method=prequantized` on folders: what others quantized is decoded, compared and run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qgrid import models, published
from qgrid.contracts import Unreachable, Unsupported
from qgrid.files import HashCache
from qgrid.methods import _checkpoint, prequantized
from qgrid.published import Layer
from qgrid.published._reading import Tensors
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell, Job, Model
from qgrid.weights import artifacts, inspection
from qgrid.weights.artifacts import BadArtifact
from tests import jobs
from tests.conftest import write_model, write_tokenizer
from tests.methods import foreign, unpacking

IDS = list(range(4, 68))
LAYER = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Made:
    """How a checkpoint is made, and what is known about it.

    `error`: relative, of weights of a normal distribution. A scale a 128 of them, whose largest is
    about 2.7 deviations, leaves a step of 5.4 / 2^bits, and 0.29 of that as error; without symmetry
    a little less, by GPTQ (which lets weights move) up to twice it. nf4 in blocks of 64: 0.09, the
    other 16 values about a quarter more; int8 a row: 0.007; E4M3: 0.026. `scaled`: others' scales
    are in the weights, without which they are compared.
    """

    method: str
    bits: int
    format: str
    error: tuple[float, float]
    logits: float | None  # largest difference of log-probabilities from decoded weights
    scaled: bool = False
    options: dict[str, Any] = field(default_factory=dict)


NATIVE = {"format": "gptq"}
ZEROS = {"symmetric": False}
KINDS = {
    "rtn3": Made("rtn", 3, "pack-quantized", (0.2, 0.26), 1e-3),
    "rtn4-zeros": Made("rtn", 4, "pack-quantized", (0.09, 0.11), 1e-3, options=ZEROS),
    "gptq4": Made("gptq", 4, "gptq", (0.11, 0.24), 1e-3, options=NATIVE),
    "gptq3-zeros": Made("gptq", 3, "gptq", (0.22, 0.45), 1e-3, options=NATIVE | ZEROS),
    "awq4": Made("awq", 4, "awq", (0.09, 0.12), 0.2, True, {"format": "awq"} | ZEROS),
    "nf4": Made("nf4", 4, "bitsandbytes-nf4", (0.085, 0.1), 0.2),
    "int8": Made("int8", 8, "bitsandbytes-int8", (0.005, 0.01), None),
    "w8a8": Made("smoothquant", 8, "int-quantized", (0.005, 0.01), None, True),
    "fp4": Made("fp4", 4, "bitsandbytes-fp4", (0.1, 0.14), None),
    "nvfp4": Made("nvfp4", 4, "nvfp4-pack-quantized", (0.08, 0.11), None),
    "mxfp4": Made("mxfp4", 4, "mxfp4-pack-quantized", (0.1, 0.15), None),
    "fp8": Made("fp8", 8, "float-quantized", (0.023, 0.028), None, options={"scheme": "block"}),
}
Publish = Callable[[str], Path]
Make = Callable[..., Job]


@pytest.fixture(scope="module")
def publish(
    tmp_path_factory: pytest.TempPathFactory, tiny_random: Path, make_cell: Callable[..., Cell]
) -> Publish:
    """The folder of a kind, made once from the random model."""
    known: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in known:
            kind, store = KINDS[name], tmp_path_factory.mktemp("publisher")
            known[name] = foreign.stripped(
                make_cell, store, tiny_random, kind.method, kind.bits, **kind.options
            )
        return known[name]

    return folder


@pytest.fixture
def make(tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]) -> Make:
    def job(path: Path | str, model: Path = tiny_random, **more: Any) -> Job:
        return foreign.job(make_cell, tmp_path / "store", model, "prequantized", path, **more)

    return job


@pytest.fixture
def copy(publish: Publish, tmp_path: Path) -> Path:
    """A 3-bit checkpoint to be spoiled."""
    return Path(shutil.copytree(publish("rtn3"), tmp_path / "copy"))


# --- what is good --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_folder_becomes_an_artifact(
    name: str, publish: Publish, make: Make, tmp_path: Path, tiny_random: Path
) -> None:
    kind, source = KINDS[name], publish(name)
    job = make(source)
    cell = job.planned.cell
    assert (cell.bits, cell.calibration) == (kind.bits, None)
    assert prequantized.refusal(cell) is None
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    told = {"config", "shapes", "weights", "kept", "vocabulary", "chat_template", "reload"}
    assert told <= {check.name for check in result.checks}
    assert result.observed["format"] == kind.format
    assert result.observed["module_methods"] == {"prequantized": 14}
    kept = next(check.actual for check in result.checks if check.name == "kept")
    assert ("scaled as the layers after them" in kept) == kind.scaled
    assert (Path(job.artifact) / "model.safetensors").resolve().parent == source.resolve()
    config = json.loads((Path(job.artifact) / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())
    cache = HashCache(tmp_path / "hashes.json")
    checks = artifacts.verify(Path(job.artifact), job.planned, cache, full=True)
    assert all(check.ok for check in checks), checks
    if kind.logits is not None:
        assert _apart(Path(job.artifact), cell, tiny_random) < kind.logits


def _apart(
    artifact: Path, cell: Cell, base: Path, stored: dict[str, torch.Tensor] | None = None
) -> float:
    """The engine, by the format's library, against a plain model with the weights decoded here.

    nf4 and awq round products or scales to 16 bits whatever is asked.
    """
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stored = stored or load_file(artifact / "model.safetensors")
    for name, parameter in plain.named_parameters():
        if name in stored and stored[name].shape == parameter.shape:
            parameter.data = stored[name].float()  # norms that scales went into
    for name, weights in decoded(artifact, base).items():
        plain.get_submodule(name).weight.data = weights
    expected = _checkpoint.logits(plain, IDS).log_softmax(-1)[:-1]
    engine = runtime.load(artifact, cell, "float32")
    found = next(iter(engine.score([IDS], [len(IDS) - 1]))).logprobs
    return float((found - expected).abs().max())


def decoded(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "config.json").read_text())
    stored, family = Tensors(folder), published.family(config)
    return {
        name: torch.from_numpy(family.weights(config, Layer(stored.layer(name), *shape)))
        for name, shape in inspection.decoder_linears(inspection.read_headers(base)).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_decoded_weights_are_near_the_base(name: str, publish: Publish, tiny_random: Path) -> None:
    kind, original = KINDS[name], load_file(tiny_random / "model.safetensors")
    low, high = kind.error
    for layer, weights in decoded(publish(name), tiny_random).items():
        base = original[f"{layer}.weight"].float()
        if kind.scaled:
            base = unscaled(base, weights)
        assert low < float((weights - base).norm() / base.norm()) < high, layer


def unscaled(base: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The base under the scales of columns and rows that are nearest to what was found."""
    columns = (base * found).sum(0) / (base**2).sum(0)
    rows = ((base * columns) * found).sum(1) / ((base * columns) ** 2).sum(1)
    return base * columns * rows[:, None]


def without_groups(source: Path, folder: Path) -> Path:
    """A copy without the group of each column."""

    def leave_out(tensors: dict[str, torch.Tensor]) -> None:
        for key in [each for each in tensors if each.endswith(".g_idx")]:
            del tensors[key]

    return foreign.changed(source, folder, leave_out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq4", "gptq3-zeros"])
def test_groups_in_order_need_not_be_stored(
    name: str, publish: Publish, tmp_path: Path, tiny_random: Path
) -> None:
    source = publish(name)
    bare = without_groups(source, tmp_path / "bare")
    for layer, weights in decoded(bare, tiny_random).items():
        assert torch.equal(weights, decoded(source, tiny_random)[layer])
    kept = inspection.stored_linears(source, inspection.read_headers(source))
    headers = inspection.read_headers(bare)
    assert inspection.stored_linears(bare, headers) == kept
    foreign.configured(bare, settings(desc_act=True))
    config = published.read(bare)
    with pytest.raises(published.Unreadable, match=r"orders columns by `desc_act` and has no"):
        published.family(config).added(config, headers)


@pytest.mark.slow
def test_groups_that_are_not_stored_are_added(
    publish: Publish, make: Make, tmp_path: Path, tiny_random: Path
) -> None:
    """transformers would take what the memory holds for them."""
    source = publish("gptq4")
    job = make(without_groups(source, tmp_path / "bare"))
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    artifact, whole = Path(job.artifact), load_file(source / "model.safetensors")
    added = load_file(artifact / "added.safetensors")
    assert added.keys() == {key for key in whole if key.endswith(".g_idx")}
    assert all(torch.equal(added[key], whole[key]) for key in added)
    stored = whole | added
    assert _apart(artifact, job.planned.cell, tiny_random, stored) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_four_bit_codes_in_bytes_of_another_name(
    storage: str, make: Make, tmp_path: Path, tiny_random: Path
) -> None:
    """As a training that shards parameters wants them: `bnb_4bit_quant_storage`."""
    whole, other = (tmp_path / each for each in ("uint8", storage))
    for folder in (whole, other):
        foreign.write_nf4(tiny_random, folder, folder.name)
    for layer, weights in decoded(whole, tiny_random).items():
        assert torch.equal(weights, decoded(other, tiny_random)[layer])
    result = artifacts.build(make(other))
    assert all(check.ok for check in result.checks), result.checks
    assert result.observed["module_methods"] == {"prequantized": 14}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq4", "gptq3-zeros", "awq4"])
def test_decoding_agrees_with_another_one(name: str, publish: Publish, tiny_random: Path) -> None:
    others = unpacking.weights(publish(name))
    for layer, weights in decoded(publish(name), tiny_random).items():
        assert torch.allclose(weights.double(), others[layer], rtol=1e-6, atol=1e-9)


def test_decoding_nf4_agrees_with_its_library(publish: Publish, tiny_random: Path) -> None:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    stored = load_file(publish("nf4") / "model.safetensors")
    parts = {name: stored[name] for name in stored if name.startswith(f"{LAYER}.weight.")}
    state = QuantState.from_dict(parts, torch.device("cpu"))
    state.dtype = torch.float32
    expected = dequantize_4bit(stored[f"{LAYER}.weight"], state)
    assert torch.allclose(decoded(publish("nf4"), tiny_random)[LAYER], expected, atol=1e-6)


def test_checkpoint_of_the_hub_in_several_files(
    publish: Publish, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = Path(shutil.copytree(publish("rtn3"), tmp_path / "cached"))
    foreign.split(cached)
    asked = []

    def download(model: Model, offline: bool, into: Path | None = None) -> Path:
        asked.append((model.id, model.revision))
        return cached

    monkeypatch.setattr(models, "_download", download)
    job = make("acme/model-3bit@abc123")
    assert job.planned.cell.bits == 3
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    assert {name for name in asked if name[0] != str(cached)} == {("acme/model-3bit", "abc123")}
    links = {path.name for path in Path(job.artifact).iterdir() if path.is_symlink()}
    assert len(links) == 3
    assert "model.safetensors.index.json" in links


# --- faults --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untied(
    tmp_path_factory: pytest.TempPathFactory, make_cell: Callable[..., Cell]
) -> tuple[Path, Path]:
    """A base with a head of its own, and its 4-bit checkpoint."""
    base = tmp_path_factory.mktemp("untied")
    write_model(base, tie_word_embeddings=False)
    write_tokenizer(base)
    store = tmp_path_factory.mktemp("publisher")
    return base, foreign.stripped(make_cell, store, base, "rtn", 4)


def test_random_head_is_caught(untied: tuple[Path, Path], make: Make, tmp_path: Path) -> None:
    base, source = untied

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.randn_like(tensors["lm_head.weight"]) * 0.08

    bad = foreign.changed(source, tmp_path / "bad", spoil)
    with pytest.raises(BadArtifact, match=r"check `kept`.*lm_head\.weight has other values"):
        artifacts.build(make(bad, base))


def test_missing_head_is_caught(untied: tuple[Path, Path], make: Make, tmp_path: Path) -> None:
    base, source = untied
    bad = foreign.changed(source, tmp_path / "bad", lambda t: t.pop("lm_head.weight"))  # type: ignore[arg-type]
    with pytest.raises(BadArtifact, match=r"check `shapes`.*lm_head\.weight is missing"):
        artifacts.build(make(bad, base))


def test_weights_of_another_model_are_caught(publish: Publish, make: Make, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_model(other, seed=1)
    write_tokenizer(other)
    with pytest.raises(BadArtifact, match=r"check `weights`.*is 1\.4 of its size apart"):
        artifacts.build(make(publish("rtn3"), other))


@pytest.mark.parametrize(
    ("tensor", "check"),
    [("model.norm.weight", "kept"), ("model.layers.1.input_layernorm.weight", "kept"),
     ("model.embed_tokens.weight", "kept"), (f"{LAYER}.weight_scale", "weights")],
)  # fmt: skip
def test_changed_tensor_is_caught_and_named(
    tensor: str, check: str, publish: Publish, make: Make, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        rows = torch.arange(len(tensors[tensor])) % 2  # every other one is twice as large
        tensors[tensor] *= (1 + rows).reshape(-1, *[1] * (tensors[tensor].dim() - 1))

    bad = foreign.changed(publish("rtn3"), tmp_path / "bad", spoil)
    name = tensor.removesuffix(".weight_scale")
    with pytest.raises(BadArtifact, match=rf"check `{check}`.*{name}"):
        artifacts.build(make(bad))


def test_four_bit_floats_under_scales_of_exponents(
    publish: Publish, tmp_path: Path, tiny_random: Path
) -> None:
    """torch has a type of such scales; bytes of the same exponents mean the same."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [each for each in tensors if each.endswith(".weight_scale")]:
            tensors[key] = tensors[key].view(torch.float8_e8m0fnu)

    source = publish("mxfp4")
    other = foreign.changed(source, tmp_path / "other", rename)
    expected = decoded(source, tiny_random)
    assert all(each.equal(expected[k]) for k, each in decoded(other, tiny_random).items())
    assert inspection.inspect(other).format == "mxfp4-pack-quantized"


def test_norm_that_is_a_tenth_larger_is_caught(
    publish: Publish, make: Make, tmp_path: Path
) -> None:
    """No layer's columns are smaller for it, so that it is no quantizer's scale."""
    name = "model.layers.1.input_layernorm.weight"
    bad = foreign.changed(publish("rtn3"), tmp_path / "bad", lambda t: t[name].mul_(1.1))  # type: ignore[arg-type]
    with pytest.raises(BadArtifact, match=rf"check `kept`.*{name} has other values"):
        artifacts.build(make(bad))


def test_swapped_tokenizer_is_caught(copy: Path, make: Make) -> None:
    jobs.swap_tokenizer(copy)
    with pytest.raises(BadArtifact, match=r"check `vocabulary`.*another vocab"):
        artifacts.build(make(copy))


def test_another_chat_template_is_named(copy: Path, make: Make, tiny_random: Path) -> None:
    """The artifact has the base's, so that prompts are the same in every cell."""
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    job = make(copy)
    said = {check.name: check for check in artifacts.build(job).checks}["chat_template"]
    assert (said.ok, said.fatal) == (False, False)
    assert said.actual == "another chat_template"
    kept = Path(job.artifact) / "chat_template.jinja"
    assert kept.read_text() == (tiny_random / "chat_template.jinja").read_text()


def test_module_left_out_is_named(
    copy: Path, make: Make, tiny_random: Path, tmp_path: Path
) -> None:
    def leave_out(tensors: dict[str, torch.Tensor]) -> None:
        for name in [each for each in tensors if each.startswith(LAYER)]:
            del tensors[name]
        whole = load_file(tiny_random / "model.safetensors")
        tensors[f"{LAYER}.weight"] = whole[f"{LAYER}.weight"]

    bad = foreign.changed(copy, tmp_path / "bad", leave_out)
    foreign.configured(bad, lambda c: c["quantization_config"]["ignore"].append(LAYER))
    with pytest.raises(BadArtifact) as error:
        artifacts.build(make(bad))
    said = {check.name: check.actual for check in error.value.checks if not check.ok}
    assert said["coverage"] == f"92.9%, not {LAYER} (16bit)"
    accepted = artifacts.build(make(bad, accept_fallback=True))
    assert accepted.observed["module_methods"] == {"prequantized": 13, "none": 1}


def test_16_bit_weights_that_are_named_quantized_are_caught(
    copy: Path, make: Make, tiny_random: Path
) -> None:
    jobs.unquantize(tiny_random)(copy)
    with pytest.raises(BadArtifact, match=r"check `weights`.*no layer is quantized"):
        artifacts.build(make(copy))


def test_another_architecture_is_caught(copy: Path, make: Make) -> None:
    foreign.configured(copy, lambda config: config.update(rms_norm_eps=0.1))
    with pytest.raises(BadArtifact, match=r"check `config`.*rms_norm_eps is 0\.1, not 1e-06"):
        artifacts.build(make(copy))


# --- refusals ------------------------------------------------------------------------------------


def settings(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("quantization_config"), "so it is not quantized"),
        (settings(quant_method="exl2"), "is quantized by `exl2` (known: aqlm, awq, bitsandbytes"),
        (settings(quant_method="awq", bits=8), "is `awq` with 8 bits (known: 4)"),
        (settings(quant_method="awq", bits=4, version="gemv"), "packs `awq` as `gemv`"),
        (settings(quant_method="gptq", bits=4, lm_head=True), "has a quantized output head"),
        (settings(quantization_status="frozen"), "is not compressed: its status is `frozen`"),
    ],
)
def test_unknown_checkpoint_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, copy: Path, make: Make
) -> None:
    foreign.configured(copy, change)
    job = make(copy)
    assert message in str(prequantized.refusal(job.planned.cell))
    with pytest.raises(Unsupported, match=r"use another checkpoint"):
        artifacts.build(job)


def test_weights_that_transformers_does_not_find_are_refused(copy: Path, make: Make) -> None:
    (copy / "model.safetensors").rename(copy / "gptq_model-4bit-128g.safetensors")
    assert "has no `model.safetensors`" in str(prequantized.refusal(make(copy).planned.cell))


def test_folder_without_a_config_is_no_id_of_the_hub(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    cell = make(tmp_path / "any").planned.cell
    monkeypatch.chdir(tmp_path)
    options = {**cell.method.options, "path": "org/name"}
    said = prequantized.refusal(replace(cell, method=replace(cell.method, options=options)))
    assert "nor a folder with a `config.json`" in str(said)


def test_unreachable_id_is_one_sentence(make: Make) -> None:
    job = make("acme/model-gptq@abc123")
    with pytest.raises(Unreachable, match=r"from the hub at this moment .*; run again when"):
        prequantized.refusal(job.planned.cell)
    with pytest.raises(Unreachable, match="at this moment"):
        artifacts.build(job)


def test_id_is_known_by_its_revision_and_folder_by_content(copy: Path, tmp_path: Path) -> None:
    cache = HashCache(tmp_path / "hashes.json")
    hub = {"path": "acme/model-gptq@abc123"}
    assert prequantized.identity(hub, cache) == hub
    before = prequantized.identity({"path": str(copy)}, cache)
    assert before.keys() == {"files"}
    foreign.configured(copy, settings(version="another"))
    assert prequantized.identity({"path": str(copy)}, cache) != before
    with pytest.raises(FileNotFoundError, match=r"neither a `\.gguf` file, nor a folder"):
        prequantized.identity({"path": str(tmp_path / "missing")}, cache)
