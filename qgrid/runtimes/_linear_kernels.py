"""What multiplies the linear layers of a loaded torch model, for the record and its checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qgrid import gptq_kernels
from qgrid.runtimes import _storage
from qgrid.types import Check

if TYPE_CHECKING:
    import torch


def kernels(model: torch.nn.Module, dtype: str) -> list[dict[str, Any]]:
    """What multiplies the linear layers, in groups of equal ones: how many, and by which kernel.

    `dense` is a product of unpacked weights. `dtype` is that of the activations between layers.
    """
    found = Counter(_kernel(module, dtype) for module in _storage.linears(model).values())
    keys = ("method", "scheme", "kernel", "dtype")
    return [
        {"modules": count, **dict(zip(keys, each, strict=True))} for each, count in found.items()
    ]


def _kernel(module: Any, dtype: str) -> tuple[str, str, str, str]:
    """Method, scheme, kernel and dtype of one layer."""
    if gptq_kernels.is_kernel(module):
        names = gptq_kernels.format_of(module), gptq_kernels.name(module)
        return names[0], f"W{module.bits}A16", names[1], gptq_kernels.computes_in(module, dtype)
    kind = type(module).__name__
    if kind in {"Linear4bit", "Linear8bitLt"}:
        scheme = "W4A16" if kind == "Linear4bit" else "W8A8"
        return "bitsandbytes", scheme, "bitsandbytes", dtype
    layout = getattr(module, "quantization_scheme", None)
    computed = str(module.weight.dtype).removeprefix("torch.")
    if layout is None or layout.weights is None:
        return "none", "W16A16", "dense", computed
    inputs = layout.input_activations
    scheme = f"W{layout.weights.num_bits}A{16 if inputs is None else inputs.num_bits}"
    return "compressed-tensors", scheme, "dense", computed


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
