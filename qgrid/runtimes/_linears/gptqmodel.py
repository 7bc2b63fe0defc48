"""Layers of gptqmodel: native `gptq` and `awq` checkpoints."""

from __future__ import annotations

from typing import Any

from qgrid.layouts import native as layout
from qgrid.libraries import gptq_kernels
from qgrid.runtimes._linears import Kernel, Stored

FORMATS = layout.FORMATS
ADAPTED = ("gptq",)  # `awq` scales the inputs of its layers, which an adapter was not trained on
PACKAGES = ("gptqmodel",)
claims = gptq_kernels.is_kernel


def stored(module: Any, plain: str | None) -> Stored:
    """Packed as in the file, or rounded again to 8 bits for its kernel."""
    return Stored("int8", 8) if getattr(module, "qweight", None) is None else arrived(module)


def arrived(module: Any) -> Stored:
    """What it was given to load: other widths would not fit its tensors."""
    return Stored(gptq_kernels.format_of(module), int(module.bits))


def kernel(module: Any, dtype: str) -> Kernel:
    """The kernel that the library chose or was told."""
    return Kernel(
        gptq_kernels.format_of(module),
        f"W{module.bits}A16",
        gptq_kernels.name(module),
        gptq_kernels.computes_in(module, dtype),
    )


def compute_in(module: Any, dtype: str) -> None:
    """Scales in fp32 for fp32: it would round scale times code to fp16."""
    if gptq_kernels.computes_exactly(module, dtype):
        module.scales = module.scales.float()
