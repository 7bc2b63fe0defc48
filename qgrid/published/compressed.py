"""compressed-tensors: packed words of integers, whole bytes of integers or floats, 4-bit floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qgrid.layouts.compressed import FORMATS
from qgrid.published import (
    SETTINGS,
    Claims,
    Config,
    Description,
    Layer,
    Unreadable,
    _codes,
    scale_bits,
    settings,
)

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

KINDS = ("compressed-tensors",)
_PACKAGES = ("compressed-tensors", "torch", "transformers")
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1; the highest bit is the sign
_SHAPE_BITS = 128  # two 64-bit integers beside packed words
_ACTIVATION_BITS = 96  # a scale and a zero point of the activations, where they are calibrated


def described(config: Config) -> Description:
    """See `qgrid.published`. The width is that of the group which takes every linear layer.

    Raises:
        Unreadable: a layout that is not read here.
    """
    told = settings(config)
    if told.text("quantization_status") not in {"compressed", None}:
        raise Unreadable(f"is not compressed: its status is `{told.text('quantization_status')}`")
    told.refuse("transform_config", "kv_cache_scheme")  # turned weights; a smaller KV cache
    sparse = told.part("sparsity_config").text("format")
    if sparse not in {"dense", None}:
        raise Unreadable(f"is stored as `{sparse}`, which is not read here")
    groups = [group for _, group in told.part("config_groups").parts() if group.has("weights")]
    if not groups:
        raise Unreadable("names no group of quantized layers")
    formats = sorted({_checked(group, told.text("format")) for group in groups})
    main = next((group for group in groups if "Linear" in group.texts("targets")), groups[0])
    return Description("+".join(formats), main.part("weights").count("num_bits"), _PACKAGES)


def _checked(group: Claims, default: str | None) -> str:
    """How a group of layers is stored; everything that is used of its settings can be."""
    form = group.text("format") or default
    if form not in FORMATS:
        raise Unreadable(f"is stored as `{form}` (known: {', '.join(FORMATS)})")
    group.refuse("output_activations")
    group.part("input_activations")
    told = group.part("weights")
    told.count("num_bits")
    told.flag("symmetric", absent=True)
    told.text("actorder")
    strategy = told.name("strategy", *_STRATEGIES)
    if strategy == "group":
        told.count("group_size")
    if strategy == "block":
        told.counts("block_structure")
    return form


def _groups(told: Config) -> Sequence[Config]:
    return [group for group in told["config_groups"].values() if group.get("weights")]


def _format(told: Config, group: Config) -> str:
    return str(group.get("format") or told["format"])


def stored_bits(config: Config, rows: int, columns: int) -> tuple[float, float]:
    """Lowest and highest of the config's groups of layers."""
    found = []
    for group in _groups(config[SETTINGS]):
        told, kind = group["weights"], _format(config[SETTINGS], group)
        low = _layer_bits(kind, told, scale_bits(config), rows, columns)
        calibrated = group.get("input_activations")
        high = low + (_ACTIVATION_BITS if calibrated else 0)
        found += [low / (rows * columns), high / (rows * columns)]
    return min(found), max(found)


def _layer_bits(kind: str, told: Config, scale: int, rows: int, columns: int) -> int:
    """Bits of one layer: codes, scales, zero points and what else the layout has."""
    bits, weights = told["num_bits"], rows * columns
    if kind == "nvfp4-pack-quantized":
        return 4 * weights + 8 * weights // 16 + 32
    if kind == "mxfp4-pack-quantized":
        return 4 * weights + 8 * weights // 32
    scales = _num_scales(told, rows, columns)
    if kind != "pack-quantized":
        return 8 * weights + scales * scale
    groups = -(-scales // rows)
    zeros = 0 if told.get("symmetric") in (True, None) else groups * _words(rows * bits)
    places = 32 * columns if told.get("actorder") == "group" else 0
    return rows * _words(columns * bits) + scales * scale + zeros + places + _SHAPE_BITS


def _words(bits: int) -> int:
    return 32 * -(-bits // 32)


def _num_scales(told: Config, rows: int, columns: int) -> int:
    strategy = told.get("strategy")
    if strategy == "group":
        return rows * -(-columns // int(told["group_size"]))
    if strategy == "block":
        height, width = told["block_structure"]
        return -(-rows // int(height)) * -(-columns // int(width))
    return rows if strategy == "channel" else 1


def weights(config: Config, layer: Layer) -> Array:
    """See `qgrid.published`. What each layer is tells its own tensors, not the config's groups."""
    parts = layer.parts
    if "weight_packed" not in parts:
        return _whole(layer)
    if "weight_shape" in parts:
        return _packed(layer)
    return _float4(parts)


def _packed(layer: Layer) -> Array:
    """Dense streams of unsigned codes; zero points are streams down the rows."""
    parts = layer.parts
    words = parts["weight_packed"]
    bits = next(b for b in range(1, 9) if _words(layer.columns * b) == 32 * words.shape[1])
    codes = _codes.stream(words, bits, layer.columns)
    scales = parts["weight_scale"].reshape(layer.rows, -1)
    group = _group(parts, layer.columns, scales.shape[1])
    if "weight_zero_point" not in parts:
        return _product(codes - 2 ** (bits - 1), scales[:, group])
    zeros = _codes.stream(parts["weight_zero_point"].T, bits, layer.rows).T
    return _product(codes - zeros[:, group], scales[:, group])


def _whole(layer: Layer) -> Array:
    """A byte a weight: a scale a tensor, a row, a group of a row or a block."""
    parts = layer.parts
    codes, scale = parts["weight"].astype("f4"), parts["weight_scale"]
    if "weight_zero_point" in parts:
        codes = codes - _spread(parts["weight_zero_point"].astype("f4"), layer)
    return _product(codes, _spread(scale, layer))


def _spread(scale: Array, layer: Layer) -> Array:
    """One scale a weight, or one a row."""
    if scale.size == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1 or scale.shape[1] == 1:
        return scale.reshape(layer.rows, 1)
    high, wide = -(-layer.rows // scale.shape[0]), -(-layer.columns // scale.shape[1])
    spread: Array = scale.repeat(high, 0).repeat(wide, 1)[: layer.rows, : layer.columns]
    return spread


def _float4(parts: Mapping[str, Array]) -> Array:
    """Two floats a byte; the scales are 8-bit floats under one of all, or powers of two."""
    import numpy as np

    table = np.array([*_FLOAT4, *(-each for each in _FLOAT4)], np.float32)
    values = table[_codes.nibbles(parts["weight_packed"], high_first=False)]
    scale = parts["weight_scale"]
    if "weight_global_scale" in parts:
        scale = scale / parts["weight_global_scale"]
    else:
        scale = np.exp2(scale.astype(np.float32) - 127)
    return _product(values, scale.repeat(values.shape[1] // scale.shape[1], 1))


def _group(parts: Mapping[str, Array], columns: int, groups: int) -> Array:
    """The group of each column."""
    import numpy as np

    if "weight_g_idx" in parts and (parts["weight_g_idx"] >= 0).all():
        return parts["weight_g_idx"]
    return np.arange(columns) // -(-columns // groups)


def _product(codes: Array, scales: Array) -> Array:
    import numpy as np

    found: Array = codes.astype(np.float32) * scales
    return found
