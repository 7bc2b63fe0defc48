"""What multiplies the linear layers of a loaded torch model, for the record and its checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qgrid.libraries import gptq_kernels
from qgrid.runtimes import _linears, _storage
from qgrid.types import Check

if TYPE_CHECKING:
    import torch


def kernels(model: torch.nn.Module, dtype: str) -> list[dict[str, Any]]:
    """What multiplies the linear layers, in groups of equal ones: how many, and by which kernel.

    `dense` is a product of unpacked weights. `dtype` is that of the activations between layers.
    """
    found = Counter(_linears.kernel(module, dtype) for module in _storage.linears(model).values())
    return [{"modules": count, **asdict(each)} for each, count in found.items()]


def facts(model: torch.nn.Module, dtype: str, device: str) -> dict[str, Any]:
    """The keys of `observed` that tell the kernel of quantized layers."""
    layers = kernels(model, dtype)
    facts: dict[str, Any] = {"linear_kernels": layers}
    quantized = [layer for layer in layers if layer["method"] != "none"]
    if quantized:
        facts["kernel"] = "+".join(sorted({layer["kernel"] for layer in quantized}))
    config = getattr(model.config, "quantization_config", None)
    told = getattr(config, "sym", True), dtype, device
    for module in filter(gptq_kernels.is_kernel, _storage.linears(model).values()):
        if slow := gptq_kernels.slow(module, *told):
            facts["slow_kernel"] = slow
    return facts


def checks(layers: Sequence[Mapping[str, Any]], asked: str) -> tuple[Check, ...]:
    """The kernel that was asked for is there; fatal."""
    kernels = {layer["kernel"] for layer in layers if layer["method"] in gptq_kernels.KERNELS}
    if asked == gptq_kernels.AUTO:
        return ()
    found = ", ".join(sorted(kernels)) or "no such layer"
    return (Check("kernel", kernels == {asked}, asked, found),)
