"""Where checkpoints lie, and what identifies them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import qgrid.demo
from qgrid import models
from qgrid.files import HashCache
from qgrid.models import ModelNotFound
from qgrid.types import Model
from qgrid.weights import inspection


def model(name: str, revision: str | None = None) -> Model:
    return Model("m", name, revision, False, False)


def test_embedded_model_lies_in_the_package() -> None:
    assert models.resolve(model("qgrid/tiny")) == qgrid.demo.MODEL_DIR
    assert set(models.identity(model("qgrid/tiny"))) == {"files"}


def test_local_folder(tiny_random: Path) -> None:
    assert models.resolve(model(str(tiny_random))) == tiny_random.resolve()


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_missing_folder_is_one_sentence(name: str) -> None:
    with pytest.raises(ModelNotFound, match=r"`model\.id=.*is not a folder; give an existing"):
        models.resolve(model(name))
    assert models.located(model(name)) is None


def test_hub_id_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = model("some-org/some-model", "abc")
    assert models.located(asked) is None
    with pytest.raises(ModelNotFound, match=r"some-org/some-model.*neither a folder nor a hub id"):
        models.resolve(asked)
    assert models.identity(asked) == {"id": "some-org/some-model", "revision": "abc"}
    own_code = replace(asked, trust_remote_code=True)
    assert models.identity(own_code) != models.identity(asked)


def test_identity_is_the_content_not_the_place(tiny_random: Path, tmp_path: Path) -> None:
    cache = HashCache(tmp_path / "hashes.json")
    first = models.identity(model(str(tiny_random)), cache)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_random, moved)
    (moved / "README.md").write_text("not part of the model")
    assert models.identity(model(str(moved)), cache) == first
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")
    assert models.identity(model(str(moved)), cache) != first


def test_resource_is_found_in_package_folder_and_config_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models.resource("package:qgrid.demo/slices/prose.txt").is_file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("x")
    assert models.resource("here.txt") == tmp_path / "here.txt"
    assert models.resource(str(tmp_path / "here.txt")) == tmp_path / "here.txt"
    theirs = tmp_path / "their"
    (theirs / "slices").mkdir(parents=True)
    (theirs / "slices/a.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no file `slices/a\.jsonl` \(looked for "):
        models.resource("slices/a.jsonl")
    monkeypatch.setenv("QGRID_CONFIG_DIR", f"/nowhere:{theirs}")
    assert models.resource("slices/a.jsonl") == theirs / "slices/a.jsonl"


def test_architecture(tiny_random: Path) -> None:
    sizes = models.architecture(tiny_random)
    assert (sizes["layers"], sizes["kv_heads"], sizes["head_dim"], sizes["tied"]) == (
        2,
        2,
        64,
        True,
    )
    linears = 2 * (256 * 256 * 2 + 2 * 256 * 128 + 3 * 256 * 512)
    assert sizes["num_parameters"] == 512 * 256 + linears + 5 * 256


def test_tied_head_is_counted_once(tiny_random: Path) -> None:
    tensors = inspection.read_headers(tiny_random)
    embedding = tensors["model.embed_tokens.weight"]
    doubled = tensors | {"lm_head.weight": embedding}
    once = inspection.num_parameters(tiny_random, tensors)
    assert inspection.num_parameters(tiny_random, doubled) == once


def test_pickles_are_left_out_unless_allowed(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "config.json", "scores.json"):
        (tmp_path / name).write_text("{}")
    assert [p.name for p in models.checkpoint_files(tmp_path)] == [
        "config.json",
        "model.safetensors",
    ]
    allowed = [p.name for p in models.checkpoint_files(tmp_path, allow_pickle=True)]
    assert "pytorch_model.bin" in allowed
    assert models.load_options(model("x"))["use_safetensors"] is True


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "x"), ("num_attention_heads", 0), ("vocab_size", 1.5), ("head_dim", -1)],
)
def test_a_size_that_is_none_is_one_sentence(
    key: str, value: object, tmp_path: Path, tiny_random: Path
) -> None:
    told = json.loads((tiny_random / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=rf"config\.json has `{key}={value}`, which should be"):
        models.architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON .*; get the checkpoint again"):
        models.architecture(tmp_path)
