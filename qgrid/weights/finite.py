"""NaN and infinities among stored floats, found without decoding them; no torch needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qgrid import layouts
from qgrid.gguf.types import TENSOR_TYPES
from qgrid.weights.headers import read_header, read_headers

_CHUNK_BYTES = 1 << 26
# A float is NaN or infinite when all these bits are set.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),  # has no infinity; all ones is NaN
}


def nonfinite(path: Path) -> dict[str, int]:
    """How many a weights file holds, by tensor; tensors without any are left out.

    Of GGUF's quantized blocks it is the scales that are looked at: all else is whole numbers.
    """
    import numpy as np

    stored = np.memmap(path, dtype=np.uint8, mode="r")
    codes = layouts.codes(read_headers(path.parent))
    found = {}
    for name, (tensor, start) in read_header(path).items():
        layout = None if name in codes else _float_places(tensor.dtype)
        if layout is not None:
            count = _count_nonfinite(stored[start : start + tensor.nbytes], *layout)
            if count:
                found[name] = count
    return found


def _float_places(dtype: str) -> tuple[int, tuple[int, ...], str] | None:
    """Bytes of a block, where floats lie in it, and their dtype; None for a type without any."""
    if dtype in _EXPONENTS:
        return int(_EXPONENTS[dtype][0][-1]), (0,), dtype
    blocks = TENSOR_TYPES.get(dtype)  # the scales of GGUF's quantized blocks
    return None if blocks is None or not blocks.scales else (blocks.nbytes, blocks.scales, "F16")


def _count_nonfinite(stored: Any, nbytes: int, places: Sequence[int], dtype: str) -> int:
    """NaN and infinities among the floats at `places` of all blocks of `nbytes`."""
    import numpy as np

    width, mask = _EXPONENTS[dtype]
    size = int(width[-1])
    step = max(1, _CHUNK_BYTES // nbytes) * nbytes
    count = 0
    for begin in range(0, len(stored), step):
        blocks = np.asarray(stored[begin : begin + step]).reshape(-1, nbytes)
        for place in places:
            bits = np.ascontiguousarray(blocks[:, place : place + size]).view(width)
            count += int(np.count_nonzero((bits & mask) == mask))
    return count
