"""What published configs may say: unknown, malformed, not there, or not there at this moment."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import errors

from qgrid import models, published
from qgrid.contracts import Unreachable, Unsupported
from qgrid.files import HashCache
from qgrid.methods import _prequantized_places, prequantized
from qgrid.planning import legality
from qgrid.planning.facts import Facts
from qgrid.published import Unreadable, _settings
from qgrid.running import stages
from qgrid.types import Cell, Method
from tests.methods import foreign

GROUP = {
    "format": None, "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
    "output_activations": None, "targets": ["Linear"],
    "weights": {"actorder": None, "block_structure": None, "dynamic": False, "group_size": 128,
                "num_bits": 4, "strategy": "group", "symmetric": True, "type": "int"},
}  # fmt: skip
BLOCK = GROUP["weights"] | {"strategy": "block", "block_structure": [128, 128]}  # type: ignore[operator]
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True,
             "damp_percent": 0.1, "true_sequential": True, "model_file_base_name": "model",
             "checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32", "dynamic": None,
             "meta": {"quantizer": ["gptqmodel:2.2.0"], "mse": 0.0}},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True,
            "version": "gemm", "modules_to_not_convert": None},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
            "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
    "aqlm": {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 2,
             "nbits_per_codebook": 8, "linear_weights_not_to_quantize": ["lm_head.weight"]},
    "compressed": {"quant_method": "compressed-tensors", "format": "pack-quantized",
                   "config_groups": {"group_0": GROUP}, "ignore": ["lm_head"],
                   "quantization_status": "compressed", "kv_cache_scheme": None,
                   "sparsity_config": {"format": "dense"}, "transform_config": {}},
    "block": {"quant_method": "compressed-tensors", "format": "float-quantized",
              "config_groups": {"group_0": GROUP | {"weights": BLOCK}}},
}  # fmt: skip
WRONG: tuple[Any, ...] = (None, "four", -3, 0, 1.5, True, [], {}, [1], {"a": 1}, 10**9)
Spoiled = tuple[str, Any, dict[str, Any]]


def config(kind: str) -> dict[str, Any]:
    return {"model_type": "llama", "dtype": "bfloat16", "quantization_config": SETTINGS[kind]}


def spoiled(told: Any) -> Iterator[Spoiled]:
    """Copies with one key, at any depth, taken out or of another kind; and which."""
    for path in places(told):
        for value in ("gone", *WRONG):
            other = copy.deepcopy(told)
            inner = other
            for key in path[:-1]:
                inner = inner[key]
            if value == "gone":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            yield ".".join(path), value, other


def places(told: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in told.items() if isinstance(told, dict) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.parametrize("kind", SETTINGS)
def test_config_of_any_shape_is_read_or_refused_in_a_sentence(kind: str) -> None:
    read = 0
    for key, value, told in spoiled(config(kind)):
        try:
            family = published.family(told)
            found = family.described(told)
            low, high = family.stored_bits(told, 256, 512)
        except Unreadable as error:
            assert len(str(error)) < 250, (key, value)
            continue
        assert found.bits > 0, (key, value)
        assert 0 < low <= high, (key, value)
        read += 1
    assert read > 20  # keys that change nothing here


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gptq", {"bits": "four"},
         "has `quantization_config.bits=four` in its `config.json`, which should be a whole"),
        ("gptq", {"group_size": None}, "`quantization_config.group_size=null`"),
        ("compressed", {"config_groups": []}, "`quantization_config.config_groups=[]`"),
        ("compressed", {"config_groups": [1]}, "`quantization_config.config_groups=[1]`"),
        ("compressed", {"config_groups": {"a": GROUP | {"weights": None}}}, "names no group"),
        ("compressed", {"kv_cache_scheme": {"num_bits": 8}}, "which is not read here"),
        ("compressed", {"transform_config": {"a": 1}}, "which is not read here"),
        ("compressed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ("gptq", {"checkpoint_format": "marlin"}, "packs `gptq` as `marlin` (known: gptq,"),
        ("gptq", {"dynamic": {"+:.*down": {"bits": 8}}}, "layers of different widths by `dynamic`"),
        ("gptq", {"pack_dtype": "int64"}, "should be one of int32"),
        ("nf4", {"bnb_4bit_quant_type": "af4"}, "should be one of nf4, fp4"),
    ],
)  # fmt: skip
def test_refusal_names_file_and_key(kind: str, change: dict[str, Any], message: str) -> None:
    told = config(kind)
    told["quantization_config"] = told["quantization_config"] | change
    with pytest.raises(Unreadable) as error:
        published.family(told).described(told)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"dynamic": {"-:.*down": {}}}, {"extra_config": {"lm_head": {"bits": 16}}},
     {"autoround_version": "0.5", "iters": 200, "amp": True}],
)  # fmt: skip
def test_keys_of_no_effect_on_the_layers_are_passed_over(change: dict[str, Any]) -> None:
    told = config("gptq")
    told["quantization_config"] = told["quantization_config"] | change
    assert published.family(told).described(told).bits == 4


# --- the folder ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, tiny_random: Path) -> Path:
    """Weights of no matter here, and a config of nf4."""
    copied = Path(shutil.copytree(tiny_random, tmp_path / "copied"))
    foreign.configured(copied, lambda c: c.update(quantization_config=SETTINGS["nf4"]))
    return copied


def cell_of(path: Path | str, make_cell: Callable[..., Cell]) -> Cell:
    options = {"path": str(path), "accept_fallback": False}
    return make_cell(method=Method("prequantized", options), bits=4)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[1]", "has a `config.json`, which should be an object of keys"),
        ("config.json", "{", "has a `config.json` that is not JSON"),
        ("config.json", '{"quantization_config": "x"}', "`quantization_config=x`"),
        ("config.json", '{"text_config": null}', "`text_config=null`"),
        ("model.safetensors.index.json", "{}", "has no `model-1.safetensors`"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "`weight_map.a=1`"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b"}}', "has no `b`, which its"),
    ],
)  # fmt: skip
def test_files_of_any_content_are_refused_in_a_sentence(
    name: str, text: str, message: str, folder: Path, make_cell: Callable[..., Cell]
) -> None:
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        text = '{"weight_map": {"a": "model-1.safetensors"}}' if text == "{}" else text
        if "model-1" in text:
            (folder / "model-1.safetensors").unlink()
    (folder / name).write_text(text)
    cell = cell_of(folder, make_cell)
    for hook in (prequantized.support, prequantized.option_bits):
        hook(cell.method.options)
    assert prequantized.bits_per_weight(4, cell.method.options) > 0
    assert message in str(prequantized.refusal(cell))


def test_keys_that_tools_leave_are_told_and_others_are_not_passed_over(
    folder: Path, tiny_random: Path
) -> None:
    def verdict() -> tuple[bool, str]:
        found = _settings.check_config(folder, tiny_random)
        return found.ok, found.actual

    marks = {"unsloth_fixed": True, "unsloth_version": "2025.3.1", "auto_map": {"a": "b"}}
    foreign.configured(folder, lambda c: c.update(marks | {"mystery": None, "empty": []}))
    assert verdict() == (True, "the same; of no effect: auto_map, unsloth_fixed, unsloth_version")
    foreign.configured(folder, lambda c: c.update(logit_scale=2.0))
    assert verdict() == (False, "logit_scale is 2.0, not None")
    foreign.configured(folder, lambda c: c.update(hidden_size="wide"))
    ok, said = verdict()
    assert not ok
    assert "transformers does not read it (" in said


# --- the hub -------------------------------------------------------------------------------------


def answer(code: int) -> errors.HfHubHTTPError:
    asked = httpx.Request("GET", "https://hub.invalid")
    return errors.HfHubHTTPError("no", response=httpx.Response(code, request=asked))


PASSING = (answer(429), answer(503), httpx.ConnectTimeout("slow"), TimeoutError("slow"),
           errors.LocalEntryNotFoundError("offline"))  # fmt: skip
FINAL = (answer(404), answer(403), errors.HFValidationError("no id"))


@pytest.fixture
def unfetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception], None]]:
    """Nothing in the cache, and a hub that answers with an error."""

    def fail(error: Exception) -> None:
        def raise_it(*_: Any, local_files_only: bool = False, **__: Any) -> None:
            raise errors.LocalEntryNotFoundError("none") if local_files_only else error

        _prequantized_places._config_of_hub.cache_clear()
        monkeypatch.setattr("huggingface_hub.hf_hub_download", raise_it)
        monkeypatch.setattr("huggingface_hub.snapshot_download", raise_it)

    yield fail
    _prequantized_places._config_of_hub.cache_clear()


@pytest.mark.parametrize("path", ["acme/model-gptq", "acme/model-GGUF/model-Q4_0.gguf"])
@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_hub_that_does_not_answer_is_asked_again(
    error: Exception, path: str, unfetched: Callable[[Exception], None],
    make_cell: Callable[..., Cell], tiny_random: Path, tmp_path: Path,
) -> None:  # fmt: skip
    unfetched(error)
    cell = cell_of(path, make_cell)
    with pytest.raises(Unreachable) as raised:
        prequantized.quantize(cell, tiny_random, tmp_path)
    assert stages.classify(raised.value).status == "crashed"
    if not path.endswith(".gguf"):
        facts = Facts(HashCache(tmp_path / "hashes.json"))
        found = legality._refused_by_method(cell, facts)
        assert found is not None
        assert (found.status, found.rule) == ("crashed", "method")


@pytest.mark.parametrize("path", ["acme/model-gptq", "acme/model-GGUF/model-Q4_0.gguf"])
@pytest.mark.parametrize("error", FINAL, ids=["absent", "closed", "no id"])
def test_what_the_hub_has_not_is_refused(
    error: Exception, path: str, unfetched: Callable[[Exception], None],
    make_cell: Callable[..., Cell], tiny_random: Path, tmp_path: Path,
) -> None:  # fmt: skip
    unfetched(error)
    with pytest.raises(Unsupported, match="on the hub"):
        prequantized.quantize(cell_of(path, make_cell), tiny_random, tmp_path)


def test_checkpoint_of_which_the_cache_has_a_part_is_completed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, make_cell: Callable[..., Cell]
) -> None:
    foreign.split(folder)
    part = folder / "model-00002-of-00002.safetensors"
    held = part.read_bytes()
    part.unlink()
    asked = []

    def download(model: Any, offline: bool, into: Path | None = None) -> Path:
        asked.append(offline)
        if not offline and whole:
            part.write_bytes(held)
        return folder

    monkeypatch.setattr(models, "_download", download)
    whole, path = False, "acme/model-nf4"
    assert prequantized.refusal(cell_of(path, make_cell)) is None  # the rest is fetched when used
    with pytest.raises(Unreachable, match=rf"has not `{part.name}` in the hub's cache"):
        _prequantized_places.fetched(path)
    whole = True
    assert _prequantized_places.fetched(path) == folder
    assert asked[-1] is False
