"""Codes and scales that a quantizer found, put into the blocks of a GGUF file as they are.

llama.cpp would take the scale of a block anew from its largest weight, and round again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.gguf import _decoder, _tensors, layers
from qgrid.gguf import file as gguf_file

if TYPE_CHECKING:
    import numpy as np

BLOCK = 32  # weights that share a scale
TYPES: Mapping[int, str] = {4: "Q4_0", 8: "Q8_0"}  # one fp16 scale a block, no zero point


class OtherBlocks(RuntimeError):
    """A tensor of the file has another type or size than the codes that should go into it."""


@dataclass(frozen=True)
class Codes:
    """A weight matrix as signed integers `(rows, columns)` times scales `(rows, columns / 32)`."""

    values: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]


def write(file: Path, source: Path, bits: int, found: Mapping[str, Codes]) -> None:
    """Overwrite the linear layers in `file` with `found`, by their names in the checkpoint.

    `source` is the checkpoint that the file was converted from.

    Raises:
        OtherBlocks: a layer is stored as another type than the one of `bits`.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    decoder, names = _decoder.read(config), layers.tensors_of(config)
    stored = gguf_file.read(file).tensors
    with file.open("r+b") as target:
        for layer, codes in found.items():
            tensor, name = stored[names[layer]], f"{layer}.weight"
            ordered = (
                _tensors.in_order(part, decoder, name) for part in (codes.values, codes.scales)
            )
            data = _packed(bits, *ordered)
            if tensor.type.name != TYPES[bits] or tensor.nbytes != len(data):
                raise OtherBlocks(
                    f"{layer} is {tensor.nbytes} bytes of {tensor.type.name}, not {len(data)} of "
                    f"{TYPES[bits]}; choose another method for this model"
                )
            target.seek(tensor.start)
            target.write(data)


def _packed(bits: int, values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> bytes:
    """Each block its scale, then its codes: bytes, or two in one, the second half on top."""
    import numpy as np

    codes: np.ndarray[Any, Any] = values.reshape(-1, BLOCK).astype(np.int8)
    if bits == 4:
        shifted = (codes + 8).astype(np.uint8)
        codes = shifted[:, : BLOCK // 2] | shifted[:, BLOCK // 2 :] << 4
    heads = np.ascontiguousarray(scales.astype(np.float16).reshape(-1, 1)).view(np.uint8)
    return np.hstack([heads, codes.view(np.uint8)]).tobytes()
