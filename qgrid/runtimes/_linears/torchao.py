"""Ordinary linear layers whose weight is a tensor of torchao."""

from __future__ import annotations

from typing import Any

from qgrid.layouts import torchao as layout
from qgrid.runtimes._linears import Kernel, Stored

FORMATS = layout.FORMATS
PACKAGES = ("torchao",)


def claims(module: Any) -> bool:
    """By the class of the weight."""
    weight = vars(module).get("_parameters", {}).get("weight")
    return type(weight).__module__.startswith("torchao.") and hasattr(weight, "qdata")


def stored(module: Any, plain: str | None) -> Stored:
    """The bytes of the codes: the tensor itself tells the dtype that it computes in."""
    kind = "float" if module.weight.qdata.is_floating_point() else "int"
    return Stored(f"torchao-{kind}{_bits(module)}", _bits(module))


def kernel(module: Any, dtype: str) -> Kernel:
    """A product of int8 with int8 where activations are rounded too, else of unpacked weights."""
    rounded = getattr(module.weight, "act_quant_kwargs", None) is not None
    name = f"torchao-{'int8' if rounded else 'unpacked'}"
    return Kernel("torchao", f"W{_bits(module)}A{8 if rounded else 16}", name, dtype)


def compute_in(module: Any, dtype: str) -> None:
    """Tell the weight the dtype to unpack to: it keeps that of the model it was made from."""
    import torch

    weight = module.weight
    wanted = getattr(torch, dtype)
    if weight.dtype == wanted:
        return
    names, told = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names}
    made = type(weight).__tensor_unflatten__(
        inner, told | {"dtype": wanted}, weight.shape, weight.stride()
    )
    module.weight = torch.nn.Parameter(made, requires_grad=False)


def _bits(module: Any) -> int:
    codes = module.weight.qdata
    return int(8 * codes.numel() * codes.element_size() // module.weight.numel())
