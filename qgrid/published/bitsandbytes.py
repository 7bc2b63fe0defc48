"""bitsandbytes: 4-bit codes into a table with a scale a block, or int8 with a scale a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import phrases
from qgrid.layouts.bitsandbytes import STATE
from qgrid.published import SETTINGS, Config, Description, Layer, Unreadable, _codes, settings
from qgrid.published._reading import Tensors
from qgrid.types import Check

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

KINDS = ("bitsandbytes",)
PACKAGES = ("bitsandbytes", "torch", "transformers")
_DEFAULT = "fp4"  # the library's own
_BLOCK = 64  # weights a scale covers
_NESTED_BLOCK = 256  # scales that share a second scale
_STATE_BYTES, _NESTED_STATE_BYTES = 80, 170  # a line of JSON a layer, a few digits more or less


def described(config: Config) -> Description:
    """See `qgrid.published`.

    Raises:
        Unreadable: neither of 4 nor of 8 bits.
    """
    told = settings(config)
    told.flag("bnb_4bit_use_double_quant")
    kind = told.text("bnb_4bit_quant_type", "nf4", "fp4")
    told.text("bnb_4bit_quant_storage")
    four, eight = told.flag("load_in_4bit"), told.flag("load_in_8bit")
    if four:
        return Description(f"bitsandbytes-{kind or _DEFAULT}", 4, PACKAGES)
    if eight:
        return Description("bitsandbytes-int8", 8, PACKAGES)
    raise Unreadable("says neither `load_in_4bit` nor `load_in_8bit`")


def stored_bits(config: Config, rows: int, columns: int) -> tuple[float, float]:
    """Codes and scales; of 4 bits the tables and the state as well."""
    told = config[SETTINGS]
    weights = rows * columns
    if not told.get("load_in_4bit"):
        plain = 8 + 32 * rows / weights
        return plain, plain + 8 / weights  # a byte of the form, which old files lack
    exact = four_bit_width(weights, bool(told.get("bnb_4bit_use_double_quant")))
    return exact, exact


def four_bit_width(weights: int, double: bool) -> float:
    """Bits per weight of a 4-bit layer: codes, scales (`double`: as codes), tables, state."""
    blocks = -(-weights // _BLOCK)
    nested = -(-blocks // _NESTED_BLOCK)
    scales = 8 * blocks + 32 * nested + 32 * 256 if double else 32 * blocks
    tables = 32 * 16 + 8 * (_NESTED_STATE_BYTES if double else _STATE_BYTES)
    return (4 * weights + scales + tables) / weights


def weights(config: Config, layer: Layer) -> Array:
    """See `qgrid.published`."""
    parts = layer.parts
    if "SCB" in parts:
        whole = parts["weight"].view("i1").reshape(layer.rows, layer.columns)
        found: Array = whole.astype("f4") * (parts["SCB"][:, None] / 127)
        return found
    state = json.loads(next(parts[name] for name in parts if name.startswith(STATE)).tobytes())
    codes = _codes.nibbles(parts["weight"], high_first=True)[: layer.rows * layer.columns]
    scales = _scales(parts, state)
    flat = parts["weight.quant_map"][codes] * scales.repeat(state["blocksize"])[: len(codes)]
    weights: Array = flat.reshape(layer.rows, layer.columns)
    return weights


def checks(folder: Path) -> tuple[Check, ...]:
    """Scales of 4-bit layers are as they were computed, in fp32.

    On a CPU the first forward pass repacks a layer, with its scales rounded to bf16; saved after
    that, it holds other weights. A model that is loaded from such files agrees with them.
    """
    tensors = Tensors(folder)
    states = {
        name.partition(f".{STATE}")[0]: json.loads(tensors.array(name).tobytes())
        for name in tensors.headers
        if f".{STATE}" in name
    }
    if not states:  # of 8 bits
        return ()
    wrong = [
        f"{layer} has scales in {found}"
        for layer, state in states.items()
        if (found := _scale_dtype(tensors, layer, state)) not in {"F32", "float32"}
    ]
    goal = "fp32 scales, as before any forward pass"
    return (Check("scales", not wrong, goal, phrases.first(wrong) if wrong else goal),)


def _scale_dtype(tensors: Tensors, layer: str, state: Config) -> str:
    """What a layer's scales are in, or were in before they became codes."""
    if "nested_dtype" in state:
        return str(state["nested_dtype"])
    return tensors.headers[f"{layer}.weight.absmax"].dtype


def _scales(parts: Any, state: Config) -> Array:
    """A scale a block; those of double quantization are codes into a table themselves."""
    absmax: Array = parts["weight.absmax"]
    if "weight.nested_absmax" not in parts:
        return absmax
    outer = parts["weight.nested_absmax"].repeat(state["nested_blocksize"])[: len(absmax)]
    found: Array = parts["weight.nested_quant_map"][absmax] * outer + state["nested_offset"]
    return found
