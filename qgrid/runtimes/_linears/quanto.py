"""Layers of optimum-quanto: a linear layer whose weight is a tensor of codes and scales."""

from __future__ import annotations

from typing import Any

from qgrid.layouts import quanto as layout
from qgrid.runtimes._linears import Kernel, Stored

FORMATS = layout.FORMATS
ADAPTED = ("quanto-int",)
PACKAGES = ("optimum.quanto",)


def claims(module: Any) -> bool:
    """By its class."""
    return type(module).__module__.startswith("optimum.quanto.") and hasattr(module, "qweight")


def stored(module: Any, plain: str | None) -> Stored:
    """The bytes of the codes, whatever the tensor says its dtype and type are."""
    kind = "float" if module.weight.qtype.is_floating_point else "int"
    return Stored(f"quanto-{kind}", _bits(module))


def kernel(module: Any, dtype: str) -> Kernel:
    """A product of codes where torch has one for them, else of weights unpacked in every pass."""
    weight = module.weight
    computed = str(weight.dtype).removeprefix("torch.")
    name = "unpacked"
    if "forward" in vars(module):  # put there to unpack what no kernel multiplies
        pass
    elif type(weight).__name__.startswith("TinyGemm"):
        name = "int4pack"
    elif weight.qtype.name == "qint8" and computed == "bfloat16" and weight.device.type == "cpu":
        name = "int8pack"
    return Kernel("quanto", f"W{_bits(module)}A16", f"quanto-{name}", computed)


def _bits(module: Any) -> int:
    codes = module.weight._data
    while hasattr(codes, "_data"):
        codes = codes._data
    return int(8 * codes.numel() * codes.element_size() // module.weight.numel())
