"""NVFP4: four-bit floats, an FP8 scale (E4M3) for 16 of a row, one fp32 scale for the tensor.

transformers unpacks them to bf16 whatever it computes in (compressed-tensors 0.19.0): a scale times
a code has more digits, so that each weight is off by up to 2^-9 of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qgrid.contracts import Built
from qgrid.methods import _four_bit_floats as floats
from qgrid.types import Cell

SUPPORTS = floats.supports("nvfp4", calibrated=True)
Options = floats.Options
_GROUP = 16
refusal = partial(floats.refusal, _GROUP)
_WEIGHTS: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": _GROUP,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}


def calibrates(options: Mapping[str, Any]) -> bool:
    """Only the activations' scale of the tensor needs the calibration text."""
    return bool(options["activations"])


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Bits per weight of one layer: codes, a byte a group, an fp32 scale (or two) a tensor."""
    tensors = 2 if options["activations"] else 1
    return bits + 8 / _GROUP + 32 * tensors / (rows * columns)


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the checkpoint of `source` into `out`.

    Raises:
        Unsupported: the source is quantized already, or groups do not divide its layers.
    """
    return floats.quantize(cell, source, out, _WEIGHTS)
