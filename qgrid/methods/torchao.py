"""torchao: int8 or E4M3 weights with an fp32 scale a row; W8A8 with int8 activations by token.

The checkpoint is the one that transformers loads through `TorchAoConfig`. What torchao cannot make
smaller, or not with what is installed here, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qgrid import device
from qgrid.contracts import Built
from qgrid.methods import _checkpoint, _layerwise
from qgrid.types import MethodSupport
from qgrid.weights import widths

if TYPE_CHECKING:
    from qgrid.types import Cell, Gpu

_BITS = (8,)
SUPPORTS = MethodSupport(
    bits=_BITS,
    default_bits=8,
    produces=dict.fromkeys(_BITS, "torchao-int8"),
    packages=("torchao", "torch", "transformers"),
    calibrated=False,
)
_CONFIGS = {
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "float8_weight_only": "Float8WeightOnlyConfig",
}
# What torchao 0.18.0 said when it was asked, or did.
_REFUSED = {
    "int4_weight_only": (
        "is packed by `mslk`, a package for GPUs that no environment of qgrid has ('Requires mslk "
        ">= 1.0.0')"
    ),
    "intx_weight_only": "stores codes of 2 to 7 bits in a byte each, so that nothing shrinks",
}
_FLOAT8_PRODUCTS = "float8_dynamic"
_FLOAT8_SINCE = "sm_89"  # 'Float8 dynamic quantization requires CUDA compute capability >= 8.9'


@dataclass(frozen=True)
class Options:
    """`scheme`: what is rounded, and how; the last three are refused with the reason."""

    scheme: Literal[
        "int8_weight_only",
        "int8_dynamic",
        "float8_weight_only",
        "int4_weight_only",
        "float8_dynamic",
        "intx_weight_only",
    ]
    keep: Mapping[str, int] | None


def support(options: Mapping[str, Any]) -> MethodSupport:
    """Floats are another format."""
    if not _is_float(options):
        return SUPPORTS
    return replace(SUPPORTS, produces=dict.fromkeys(_BITS, "torchao-float8"))


def refusal(cell: Cell) -> str | None:
    """Why the scheme, or single layers, cannot be had; None if they can."""
    scheme = cell.method.options["scheme"]
    if scheme in _CONFIGS:
        return widths.refusal(cell, _BITS)
    reason = _without_products(cell.gpu) if scheme == _FLOAT8_PRODUCTS else _REFUSED[scheme]
    return (
        f"`method.scheme={scheme}` of torchao 0.18.0 {reason}; use one of {', '.join(_CONFIGS)}, "
        "or another method"
    )


def _without_products(gpu: Gpu) -> str:
    """Why activations and weights in E4M3 are not multiplied on a device."""
    return device.lack(gpu, _FLOAT8_SINCE, needs_gpu=True) or (
        "multiplies on this GPU what qgrid has not compared with another computation yet"
    )


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Bits per weight of one layer: a byte a weight, an fp32 scale a row, of int8 a zero point."""
    return bits + (32 if _is_float(options) else 40) / columns


def _is_float(options: Mapping[str, Any]) -> bool:
    return str(options["scheme"]).startswith("float8")


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the checkpoint of `source` into `out`.

    Raises:
        Unsupported: the source is quantized already, or the scheme is refused.
    """
    _checkpoint.refuse(refusal(cell))
    _checkpoint.refuse_quantized(source)
    model = _checkpoint.load_16bit(source, cell.model)
    layers = {name: each for name, (each, _) in _layerwise.linears(cell, source, model).items()}
    config = _config(Options(**cell.method.options).scheme)
    for layer in layers.values():
        _round(layer, config)
    _save(model, layers, config, source, out)
    ids = _checkpoint.probe(source, cell)
    return Built(probe=ids, reference=_checkpoint.logits(model, ids))


def _config(scheme: str) -> Any:
    import torchao.quantization

    # Otherwise it sets options of torch's compiler for the whole process.
    return getattr(torchao.quantization, _CONFIGS[scheme])(set_inductor_config=False)


def _round(layer: Any, config: Any) -> None:
    """Put the library's tensor in the place of a layer's weight."""
    import torch
    from torchao.quantization import quantize_

    quantize_(layer, config)
    weight = layer.weight
    empty = weight.scale == 0
    if empty.any():  # torchao 0.18.0: a row of zeros gets the scale 0, and 0 / 0 for its weights
        codes = weight.qdata.float().masked_fill(empty.expand_as(weight.qdata), 0)
        weight.qdata.copy_(codes.to(weight.qdata.dtype))
        weight.scale.copy_(torch.where(empty, 1.0, weight.scale))


def _save(model: Any, layers: Mapping[str, Any], config: Any, source: Path, out: Path) -> None:
    """Weights in the library's own safetensors layout, and the config that transformers reads."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from transformers import TorchAoConfig

    weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    flat, metadata = flatten_tensor_state_dict(weights)
    parts: dict[str, dict[str, Any]] = {name: {} for name in layers}
    for key, tensor in flat.items():
        name, _, part = key.rpartition(".")
        parts[name][part] = tensor
    for name, layer in layers.items():
        if layer.bias is not None:
            parts[name]["bias"] = layer.bias.detach()
    others = _others(model, layers)
    description = TorchAoConfig(config, modules_to_not_convert=others).to_dict()
    _layerwise.write(model, parts, _layerwise.Checkpoint(source, out, description, metadata))


def _others(model: Any, layers: Mapping[str, Any]) -> list[str]:
    """The linear layers that are left as they are."""
    import torch

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in layers
    ]
