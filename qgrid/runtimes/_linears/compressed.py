"""Layers of compressed-tensors, packed until the first forward pass unpacks them."""

from __future__ import annotations

from typing import Any

from qgrid.layouts import compressed as layout
from qgrid.runtimes._linears import Kernel, Stored, dense

FORMATS = layout.FORMATS
PACKAGES = ("compressed_tensors",)
_UNPACKED_TO_BF16 = frozenset({"nvfp4-pack-quantized", "mxfp4-pack-quantized"})


def claims(module: Any) -> bool:
    """By the scheme that it attaches; embeddings have one too."""
    scheme = getattr(module, "quantization_scheme", None)
    return hasattr(module, "in_features") and getattr(scheme, "weights", None) is not None


def stored(module: Any, plain: str | None) -> Stored:
    """The layout of packed weights; of unpacked ones what they still do to activations."""
    scheme = module.quantization_scheme
    if dense.is_plain(module):
        unpacked = dense.stored(module, plain)
        return Stored(unpacked.format + _rounding(scheme), unpacked.bits)
    return Stored(str(_value(scheme.format)), int(scheme.weights.num_bits))


def kernel(module: Any, dtype: str) -> Kernel:
    """A product of unpacked weights, in their dtype."""
    scheme = module.quantization_scheme
    inputs = scheme.input_activations
    name = f"W{scheme.weights.num_bits}A{16 if inputs is None else inputs.num_bits}"
    return Kernel("compressed-tensors", name, "dense", dense.name(module.weight.dtype))


def compute_in(module: Any, dtype: str) -> None:
    """Cast four-bit floats when they are unpacked: the library makes bf16 of them in any model.

    Seen in compressed-tensors 0.19.0, where the first product in another dtype then fails.
    """
    import torch

    if str(_value(module.quantization_scheme.format)) not in _UNPACKED_TO_BF16:
        return
    wanted = getattr(torch, dtype)

    def cast(unpacked: Any, _: Any) -> None:
        unpacked.weight.data = unpacked.weight.data.to(wanted)
        hook.remove()

    hook = module.register_forward_pre_hook(cast)


def _rounding(scheme: Any) -> str:
    """Activations are rounded as the model runs.

    Rounded values go into a product in floating point: the numbers of W8A8, not its speed.
    """
    inputs = scheme.input_activations
    if inputs is None:
        return ""
    kind = "fp" if str(_value(inputs.type)) == "float" else "int"
    return f" with activations rounded to {kind}{inputs.num_bits}"


def _value(setting: Any) -> Any:
    return getattr(setting, "value", setting)
