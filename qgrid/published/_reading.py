"""Tensors of a folder as arrays, straight from its files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import layouts
from qgrid.types import Tensor
from qgrid.weights import headers

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_PLAIN = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
}
_RAW = {"BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1"}
_FLOAT8 = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15)}  # bits of exponent, of mantissa, the bias


class Tensors:
    """The tensors of a folder's safetensors files by name."""

    def __init__(self, folder: Path) -> None:
        self.headers: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in headers.weight_files(folder):
            for name, (tensor, start) in headers.read_header(path).items():
                self.headers[name] = tensor
                self._places[name] = (path, start)

    def array(self, name: str, rows: int | None = None) -> Array:
        """A tensor; floats become fp32, and codes bytes whatever their dtype is called.

        `rows`: about so many of its first axis, spread over it.
        """
        import numpy as np

        tensor = self.headers[name]
        if name in self._codes:
            tensor = Tensor("U8", (tensor.nbytes,), tensor.nbytes)
        path, start = self._places[name]
        kind = _PLAIN.get(tensor.dtype, _RAW.get(tensor.dtype))
        if kind is None:
            raise TypeError(f"`{name}` is stored as {tensor.dtype}, which is not read here")
        if not prod(tensor.shape):
            return np.empty(tensor.shape, np.float32)
        stored = np.memmap(path, kind, "r", start, tensor.shape or (1,))
        found = stored.reshape(tensor.shape) if rows is None else stored[:: _step(stored, rows)]
        return _decoded(np.array(found), tensor.dtype)

    def layer(self, name: str) -> Mapping[str, Array]:
        """Every tensor of a layer, by its name within it."""
        prefix = f"{name}."
        own = [each for each in self.headers if each.startswith(prefix)]
        return {each.removeprefix(prefix): self.array(each) for each in own}

    @cached_property
    def _codes(self) -> frozenset[str]:
        return layouts.codes(self.headers)


def _step(stored: Array, rows: int) -> int:
    return max(1, len(stored) // rows)


def _decoded(raw: Array, dtype: str) -> Array:
    import numpy as np

    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype in _FLOAT8:
        return _float8(dtype)[raw]
    return raw.astype(np.float32) if dtype in {"F16", "F64"} else raw


@cache
def _float8(dtype: str) -> Array:
    """The value of every byte of an 8-bit float."""
    import numpy as np

    exponent_bits, mantissa_bits, bias = _FLOAT8[dtype]
    codes = np.arange(256)
    mantissa = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    exponent = (codes >> mantissa_bits) & (2**exponent_bits - 1)
    size = np.where(
        exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias)
    )
    if dtype == "F8_E4M3":
        size[(codes & 0x7F) == 0x7F] = np.nan  # its only special value
    else:
        size[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(codes & 0x80, -size, size).astype(np.float32)
