"""Layers of bitsandbytes: NF4 and FP4, and LLM.int8."""

from __future__ import annotations

from typing import Any

from qgrid.layouts import bitsandbytes as layout
from qgrid.runtimes._linears import Kernel, Stored

FORMATS = layout.FORMATS
ADAPTED = FORMATS
PACKAGES = ("bitsandbytes",)


def claims(module: Any) -> bool:
    """By the names of its classes."""
    return type(module).__name__ in {"Linear4bit", "Linear8bitLt"}


def stored(module: Any, plain: str | None) -> Stored:
    """Codes of four bits, or int8."""
    if _four(module):
        return Stored(f"bitsandbytes-{module.weight.quant_type}", 4)
    return Stored("bitsandbytes-int8", 8)


def kernel(module: Any, dtype: str) -> Kernel:
    """Its own; LLM.int8 rounds activations as well."""
    return Kernel("bitsandbytes", "W4A16" if _four(module) else "W8A8", "bitsandbytes", dtype)


def compute_in(module: Any, dtype: str) -> None:
    """Set the dtype of four-bit layers: the checkpoint's own would win otherwise.

    With AVX-512 bitsandbytes rounds activations and scales to bf16 on a CPU whatever the dtype:
    fp32 quality must not pass there.
    """
    if not _four(module):
        return
    import torch

    module.compute_dtype = getattr(torch, dtype)
    module.compute_type_is_set = True
    module.weight.quant_state.dtype = getattr(torch, dtype)  # else unpacked in bf16
    if dtype == "float32":
        module.support_avx512bf16_for_cpu = False


def _four(module: Any) -> bool:
    return type(module).__name__ == "Linear4bit"
