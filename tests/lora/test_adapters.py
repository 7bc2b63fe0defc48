"""Adapters in a plan: what identifies one, what it is called, and which are refused before work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec, config, demo, models, registry
from qgrid.files import HashCache
from qgrid.lora import adapter_fit, adapters
from qgrid.methods import _checkpoint
from qgrid.planning import plan
from qgrid.planning.facts import Facts
from qgrid.reproduction import inputs, parts
from qgrid.running.progress import labels
from qgrid.types import Model, PlannedCell
from tests import adapters as made

Plan = Callable[..., list[PlannedCell]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained adapter of the embedded model."""
    return made.write(tmp_path_factory.mktemp("adapters") / "first", demo.MODEL_DIR)


def only(cells: list[PlannedCell], **fields: Any) -> PlannedCell:
    """The one candidate with these fields of its model."""
    found = [
        each
        for each in cells
        if each.cell.method.name != "none"
        if all(getattr(each.cell.model, key) == value for key, value in fields.items())
    ]
    assert len(found) == 1
    return found[0]


# --- identity ------------------------------------------------------------------------------------


def test_identity_is_the_content_and_how_it_is_carried(adapter: Path, tmp_path: Path) -> None:
    first = adapters.identity(made.model(adapter))
    moved = shutil.copytree(adapter, tmp_path / "moved")
    (moved / "README.md").write_text("not part of it")
    assert adapters.identity(made.model(moved)) == first
    assert adapters.identity(made.model(moved, adapter_base="nf4")) == first
    assert adapters.identity(made.model(moved, "attached")) != first
    (moved / "adapter_config.json").write_text((moved / "adapter_config.json").read_text() + "\n")
    assert adapters.identity(made.model(moved)) != first


def test_a_model_without_an_adapter_has_the_identity_that_it_had(facts: Facts) -> None:
    plain = Model("tiny", models.EMBEDDED, None, False, False)
    assert adapters.identity(plain) == {}
    assert facts.model(plain) == codec.digest(models.identity(plain))


def test_hub_id_of_an_adapter_and_of_its_base_do_not_hide_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub = Model("hf", "org/base", "a", False, False, "org/adapter", "b")
    found = models.identity(hub) | adapters.identity(hub)
    assert found == {
        "id": "org/base",
        "revision": "a",
        "adapter": "org/adapter",
        "adapter_revision": "b",
        "adapter_mode": "merged",
    }
    assert adapter_fit.refusal(hub) is None  # not here: looked at when it is built
    with pytest.raises(models.ModelNotFound, match=r"`model.adapter=org/adapter`.*neither a folde"):
        adapters.resolve(hub)


def test_a_folder_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(models.ModelNotFound, match=r"`model.adapter=.*is not a folder; give"):
        adapters.resolve(made.model(tmp_path / "nowhere"))
    with pytest.raises(models.ModelNotFound, match=r"without `adapter_config.json`; give"):
        adapters.resolve(made.model(tmp_path))


# --- the plan ------------------------------------------------------------------------------------


def test_routes_share_the_merged_baseline(planned: Plan, adapter: Path) -> None:
    cells = planned("method=nf4", f"model.adapter={adapter}", "model.adapter_mode=merged,attached")
    merged, attached = (only(cells, adapter_mode=mode) for mode in ("merged", "attached"))
    base = next(each for each in cells if each.baseline_cell_id is None)
    assert len(cells) == 3
    assert base.added
    assert adapters.is_merged(base.cell.model)
    assert merged.baseline_cell_id == attached.baseline_cell_id == base.cell_id
    assert len({each.artifact_id for each in cells}) == 3
    size = sum(each.numel() for each in _tensors(adapter))
    more = attached.predicted["weight_bytes"] - merged.predicted["weight_bytes"]
    assert more == 4 * size  # quality computes in float32


def _tensors(adapter: Path) -> list[Any]:
    from safetensors.torch import load_file

    return list(load_file(adapter / adapters.WEIGHTS).values())


def test_labels_name_the_adapter(planned: Plan, adapter: Path) -> None:
    cells = planned("method=nf4", f"model.adapter=null,{adapter}")
    names = sorted(labels(cells).values())
    assert [name.split(" ")[0] for name in names] == ["tiny", "tiny", "tiny+first", "tiny+first"]
    both = planned("method=nf4", f"model.adapter={adapter}", "model.adapter_mode=merged,attached")
    assert any("tiny+first adapter_mode=attached" in name for name in labels(both).values())
    hub = Model("hf", "org/base", None, False, False, "org/spoken/")
    assert adapters.label(hub) == "org/base+spoken"


def test_another_base_than_it_was_trained_on_is_noted(planned: Plan, adapter: Path) -> None:
    cells = planned(
        "method=nf4,rtn",
        f"model.adapter={adapter}",
        "model.adapter_mode=merged,attached",
        "model.adapter_base=nf4",
    )
    told = "trained on another base: the adapter `first` on `nf4`, merged into `16bit` here"
    for each in cells:
        attached = each.cell.model.adapter_mode == "attached" and each.cell.method.name == "nf4"
        if not attached and each.status is None:
            assert each.notes == (told,)
    assert (
        only([c for c in cells if c.cell.method.name == "nf4"], adapter_mode="attached").notes == ()
    )


def test_keys_of_no_adapter_are_one_cell_with_a_remark(planned: Plan) -> None:
    cells = planned("method=nf4", "model.adapter_mode=merged,attached", "model.adapter_base=nf4")
    assert len(cells) == 2
    assert any("`model.adapter` is null" in note for each in cells for note in each.notes)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["method=rtn", "model.adapter_mode=attached"],
            r"`transformers` keeps no adapter beside `pack-quantized` \(beside: .*bitsandbytes-nf4",
        ),
        (
            ["method=gguf", "runtime=llama_cpp", "model.adapter_mode=attached"],
            r"`llama_cpp` keeps no adapter beside any weights; use `model.adapter_mode=merged`",
        ),
        (
            ["method=nf4", "model.adapter_base=nf5"],
            r"`model.adapter_base=nf5` should be what the adapter was trained on: 16bit, ",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    overrides: list[str], reason: str, planned: Plan, adapter: Path
) -> None:
    cells = planned("method=none,nf4", f"model.adapter={adapter}")
    assert all(each.status is None for each in cells)
    with pytest.raises(plan.EmptyGrid, match=reason):
        planned(*overrides, f"model.adapter={adapter}")


def test_formats_that_rescale_inputs_keep_no_adapter() -> None:
    beside = registry.runtime("transformers").LOADS.adapters
    assert {"safetensors-16bit", "bitsandbytes-nf4", "gptq"} <= set(beside)
    assert "awq" not in beside  # its scales go into the norms: the adapter would see other inputs


def test_a_dora_stays_beside_16_bits_alone(planned: Plan, adapter: Path, tmp_path: Path) -> None:
    """PEFT refuses it beside GPTQ's layers, and misreads bitsandbytes' once they are repacked."""
    folder = made.write(tmp_path / "dora", demo.MODEL_DIR, {"use_dora": True})
    for path, told in ((adapter, False), (folder, True)):
        asked = (f"model.adapter={path}", "model.adapter_mode=merged,attached")
        cells = planned("method=none,nf4,quanto", *asked)
        cells += planned("method=gptq", "method.format=gptq,compressed-tensors", *asked)
        reasons = {
            (each.cell.method.name, each.cell.method.options.get("format")): each.reason or ""
            for each in cells
            if each.cell.model.adapter_mode == "attached"
        }
        assert not reasons["none", None]
        for key in (("nf4", None), ("quanto", None), ("gptq", "gptq")):
            assert ("has `use_dora=true`" in reasons[key]) is told, key
        assert "keeps no adapter beside `pack-quantized`" in reasons["gptq", "compressed-tensors"]
    merged = planned("method=nf4", f"model.adapter={folder}")
    assert only(merged, adapter_mode="merged").status is None


def test_weights_of_others_take_no_merged_adapter(
    planned: Plan, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = registry.method("nf4")
    monkeypatch.setattr(module, "SUPPORTS", replace(module.SUPPORTS, from_base=False))
    with pytest.raises(plan.EmptyGrid, match=r"weights that somebody else made, into which"):
        planned("method=nf4", f"model.adapter={adapter}")
    attached = planned("method=nf4", f"model.adapter={adapter}", "model.adapter_mode=attached")
    assert only(attached).status is None


def test_a_lock_carries_the_adapter(adapter: Path, planned: Plan, tmp_path: Path) -> None:
    cells = planned("method=nf4", f"model.adapter={adapter}")
    whole, taken = parts.taken_apart(cells)
    assert list(whole.models) == ["tiny+first"]
    assert [parts.put_together(whole, each) for each in taken.values()] == [c.cell for c in cells]
    carried = parts.portable(whole, adapter.parent)
    assert carried.models["tiny+first"].adapter == "./first"
    assert parts.placed(carried, [adapter.parent]) == whole
    hashes, missing = inputs.read(whole, HashCache(tmp_path / "hashes.json"))
    assert not missing
    known = hashes.models["tiny+first"]
    assert {"model.safetensors", "adapter/adapter_model.safetensors"} <= known.keys()
    gone = replace(whole, models={"m": replace(whole.models["tiny+first"], adapter="/no/where")})
    assert "no folder `/no/where`" in inputs.read(gone, HashCache(tmp_path / "hashes.json"))[1][0]


# --- adapters that do not fit --------------------------------------------------------------------


def refusal(adapter: Path, **changes: Any) -> str:
    said = adapter_fit.refusal(made.model(adapter, **changes))
    assert said is not None
    assert "\n" not in said
    return said


def test_the_adapter_itself_fits(adapter: Path) -> None:
    assert adapter_fit.refusal(made.model(adapter)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "ADALORA"}, "`peft_type=ADALORA`; only LORA"),
        ({"task_type": "SEQ_CLS"}, "`task_type=SEQ_CLS`; only CAUSAL_LM"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights=pissa`, which alters the base"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save=['lm_head']`, which is not applied"),
        ({"bias": "all"}, "`bias=all`, which is not applied"),
        ({"megatron_config": {"a": 1}}, "`megatron_config={'a': 1}`, which is not applied"),
        ({"a_key_of_next_year": 3}, "`a_key_of_next_year=3`, which is not applied"),
        ({"r": 3}, r"rank 2 and 2 for `model.layers.0.mlp.down_proj`, its configuration says 3"),
        ({"rank_pattern": {"q_proj": 8}}, "self_attn.q_proj`, its configuration says 8"),
        ({"target_modules": ["q_proj", "k_proj"]}, "names `model.layers.0.self_attn.k_proj` among"),
    ],
)
def test_configurations_that_are_not_applied_are_named(
    changes: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = made.write(tmp_path / "a", demo.MODEL_DIR, changes)
    assert reason in refusal(folder)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (
            {"hidden_size": 128},
            "is for a `model.layers.0.mlp.down_proj` of 128 x 512, the model's is 256 x 768",
        ),
        ({"num_hidden_layers": 6}, "is for a `model.layers.0.mlp.down_proj` of 256 x 512"),
        (
            {"num_hidden_layers": 6, "intermediate_size": 768},
            "is for a layer `model.layers.5.mlp.down_proj`, which the model does not have",
        ),
    ],
)
def test_an_adapter_of_another_model_names_the_layer(
    shape: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    from tests.conftest import write_model

    other = tmp_path / "other"
    write_model(other, **shape)
    folder = made.write(tmp_path / "a", other, {"base_model_name_or_path": None})
    assert reason in refusal(folder)


def test_half_a_pair_and_foreign_tensors_are_named(adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapter, tmp_path / "a")
    path, stored = folder / adapters.WEIGHTS, load_file(adapter / adapters.WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({key: value for key, value in stored.items() if key != name}, path)
    assert "has lora_A of `model.layers.1.self_attn.q_proj` alone" in refusal(folder)
    save_file(stored | {"base_model.model.lm_head.weight": stored[name].clone()}, path)
    assert "holds the tensor `base_model.model.lm_head.weight`" in refusal(folder)
    path.write_bytes(path.read_bytes()[:-100])
    assert "is no whole adapter: adapter_model.safetensors has" in refusal(folder)


def test_a_pickle_is_not_read(adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "a")
    (folder / adapters.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for allow in (False, True):
        assert "only a pickle, which is not read" in refusal(folder, allow_pickle=allow)


def test_a_shared_head_is_not_changed(adapter: Path, tmp_path: Path, tiny_random: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny_random, tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    save_file(
        stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()},
        base / "model.safetensors",
    )
    folder = made.write(tmp_path / "a", base)
    pairs = load_file(folder / adapters.WEIGHTS)
    head = {"lora_A.weight": torch.zeros(2, 256), "lora_B.weight": torch.zeros(512, 2)}
    more = {f"base_model.model.lm_head.{part}": value for part, value in head.items()}
    save_file(pairs | more, folder / adapters.WEIGHTS)
    assert "changes `lm_head`, whose weights this model shares" in refusal(folder, id=str(base))


def test_another_tokenizer_is_named(adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "a")
    _checkpoint.copy_tokenizer(demo.MODEL_DIR, folder)
    assert adapter_fit.refusal(made.model(folder)) is None
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "another tokenizer than the model's (chat_template)" in refusal(folder)


def test_another_base_is_refused_until_somebody_says_what_it_was(
    tmp_path: Path, tiny_random: Path
) -> None:
    hub = made.write(tmp_path / "hub", demo.MODEL_DIR, {"base_model_name_or_path": "org/other"})
    assert "was trained on `org/other`, not on `model.id=qgrid/tiny`" in refusal(hub)
    assert adapter_fit.refusal(made.model(hub, adapter_base="nf4")) is None
    changes = {"base_model_name_or_path": str(tiny_random)}
    local = made.write(tmp_path / "local", demo.MODEL_DIR, changes)
    assert "which holds other files than `model.id=qgrid/tiny`" in refusal(local)
    copied = shutil.copytree(demo.MODEL_DIR, tmp_path / "copied")
    same = made.write(tmp_path / "same", copied)  # the embedded model elsewhere
    assert adapter_fit.refusal(made.model(same)) is None
    file = copied / "model.safetensors"  # a fine-tune of it: all names, shapes and sizes are equal
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "which holds other files than `model.id=qgrid/tiny`" in refusal(same)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": None}, "has `r=None`, which should be a number above 0"),
        ({"lora_alpha": "much"}, "has `lora_alpha=much`, which should be a number above 0"),
        ({"rank_pattern": {"q_proj": True}}, "has `q_proj=True`, which should be a number above 0"),
        ({"rank_pattern": {"(q_proj": 4}}, r"has the pattern `(q_proj`, which is none"),
    ],
)
def test_numbers_that_are_none_are_named(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert said in refusal(made.write(tmp_path / "a", demo.MODEL_DIR, changes))


def test_a_base_that_brings_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    base = shutil.copytree(demo.MODEL_DIR, tmp_path / "base")
    shutil.copyfile(adapter / adapters.CONFIG, base / adapters.CONFIG)
    said = adapter_fit.refusal(Model("hf", str(base), None, False, False))
    assert said is not None
    assert "beside its weights, which would be applied unasked" in said


def test_every_choice_of_a_model_says_so() -> None:
    keys = codec.plain(Model("x", "x", None, False, False)).keys() - {"name"}
    for path in (config.root("conf") / "model").glob("*.yaml"):
        text = path.read_text()
        assert [key for key in keys if f"\n{key}:" not in text] == []
