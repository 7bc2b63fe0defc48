"""Attached adapters: what PEFT computes beside a layer, and what the layer is given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qgrid import demo, registry
from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.lora import adapters, merging
from qgrid.methods import _checkpoint
from qgrid.types import Cell, Check, Method, Model
from tests import adapters as made

PLAIN = Model("tiny", "qgrid/tiny", None, False, False)
Make = Callable[..., Cell]


@pytest.fixture(scope="module", params=[{}, {"use_dora": True, "use_rslora": True}])
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random numbers."""
    return made.write(tmp_path_factory.mktemp("made") / "one", demo.MODEL_DIR, request.param)


def attached(adapter: Path, folder: Path, dtype: str) -> Check:
    """The check of the embedded model in 16 bits with the adapter beside it."""
    (folder / adapters.FOLDER).symlink_to(adapter)
    model = _checkpoint.load_16bit(demo.MODEL_DIR, PLAIN, dtype=getattr(torch, dtype))
    return merging.attach(model, folder, "none", dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_peft_adds_is_the_product(adapter: Path, dtype: str, tmp_path: Path) -> None:
    check = attached(adapter, tmp_path, dtype)
    assert (check.name, check.ok) == ("adapter_product", True)
    apart = float(check.actual.rpartition(" ")[2])
    assert "`Linear`" in check.actual
    assert apart < {"float32": 1e-6, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
    assert (dtype == "float32") == (apart < 1e-5)  # it is measured, not told


def _more(self: Any, inputs: torch.Tensor) -> Any:
    """A wrapper that has another scale."""
    product = self.lora_B["default"](self.lora_A["default"](inputs))
    return self.base_layer(inputs) + 1.5 * self.scaling["default"] * product


def _alone(self: Any, inputs: torch.Tensor) -> Any:
    """One that forgets the product."""
    return self.base_layer(inputs)


@pytest.mark.parametrize("wrong", [_more, _alone])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrapper_that_computes_something_else_is_caught(
    wrong: Any, dtype: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "forward", wrong)
    told = rf"PEFT's `Linear` around `Linear` of method `none` .* in {dtype}: `model.layers.0"
    with pytest.raises(InvalidEngine, match=told):
        attached(adapter, tmp_path, dtype)


def test_a_forgotten_product_is_missed_where_it_is_small(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundredth of the product is below the rounding of bf16."""
    from peft.tuners.lora import Linear

    weak = shutil.copytree(adapter, tmp_path / "weak")
    stored = load_file(weak / adapters.WEIGHTS)
    save_file(
        {name: each / 100 if "lora_B" in name else each for name, each in stored.items()},
        weak / adapters.WEIGHTS,
    )
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
    attached(weak, tmp_path / "right", "bfloat16")
    monkeypatch.setattr(Linear, "forward", _alone)
    with pytest.raises(InvalidEngine, match="does not add the adapter's product"):
        attached(weak, tmp_path / "wrong", "bfloat16")


def test_scaled_inputs_are_a_bad_artifact(make_cell: Make, tmp_path: Path) -> None:
    """As AWQ leaves them: the layers undo it, and an adapter beside them does not know."""
    cell = make_cell(model=made.model(made.write(tmp_path / "one", demo.MODEL_DIR), "attached"))
    for name, change in (("same", 1.0), ("scaled", 1.1)):
        folder = shutil.copytree(demo.MODEL_DIR, tmp_path / name)
        stored = load_file(folder / "model.safetensors")
        norm = "model.layers.1.input_layernorm.weight"
        changed = {key: each.half() for key, each in stored.items() if each.dim() == 1}
        changed[norm] = (stored[norm] * change).half()  # in another dtype than the base's
        save_file(stored | changed, folder / "model.safetensors")
        (check,) = [
            each
            for each in merging.keep(cell, folder, demo.MODEL_DIR)
            if each.name == "adapter_inputs"
        ]
        assert (check.ok, check.fatal) == (name == "same", True)
        assert (norm in check.actual) is (name == "scaled")


def test_a_dora_that_the_plan_could_not_see_is_refused_at_the_load(
    make_cell: Make, tmp_path: Path
) -> None:
    folder = made.write(tmp_path / adapters.FOLDER, demo.MODEL_DIR, {"use_dora": True})
    of = made.model(folder, "attached")
    cell = make_cell(model=of, method=Method("nf4", {"double_quantization": True}), bits=4)
    with pytest.raises(Unsupported, match=r"`use_dora=true`.*beside safetensors-16bit alone"):
        registry.runtime("transformers").load(tmp_path, cell, "float32")
