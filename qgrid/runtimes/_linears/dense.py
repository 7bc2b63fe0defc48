"""Ordinary floating-point weights, multiplied by torch."""

from __future__ import annotations

from typing import Any

from qgrid.runtimes._linears import Kernel, Stored

FORMATS = ("safetensors-16bit", "safetensors-32bit")
ADAPTED = ("safetensors-16bit",)
ADAPTED_DORA = ADAPTED


def is_plain(module: Any) -> bool:
    """Whether the weight is an ordinary floating-point matrix of 16 bits or more."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.is_floating_point() and weight.element_size() > 1


def claims(module: Any) -> bool:
    """Whatever multiplies and belongs to no library."""
    return True


def stored(module: Any, plain: str | None) -> Stored:
    """The dtype of the weight, or what it was in the file."""
    import torch

    weight = getattr(module, "weight", None)
    if weight is None:
        return Stored(type(module).__name__, 0)
    dtype = plain if plain and is_plain(module) else name(weight.dtype)
    return Stored(dtype, 8 * getattr(torch, dtype).itemsize)


def kernel(module: Any, dtype: str) -> Kernel:
    """A product of the weights as they are."""
    import torch

    weights, inputs = (8 * each.itemsize for each in (module.weight.dtype, getattr(torch, dtype)))
    return Kernel("none", f"W{weights}A{inputs}", "dense", name(module.weight.dtype))


def name(dtype: Any) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
