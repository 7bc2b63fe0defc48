"""Whole numbers of a few bits, unpacked from the words that hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def stream(words: Array, bits: int, count: int) -> Array:
    """The first `count` codes of every row of 32-bit words, one dense stream a row, low end first.

    `(rows, words)` becomes `(rows, count)` of int32.
    """
    import numpy as np

    raw = np.ascontiguousarray(words).view(np.uint32).astype(np.uint64)
    first = np.arange(count) * bits
    place, shift = first // 32, (first % 32).astype(np.uint64)
    after = np.concatenate([raw[:, 1:], np.zeros_like(raw[:, :1])], axis=1)
    pairs = raw | (after << np.uint64(32))  # a code may reach into the next word
    codes = (pairs[:, place] >> shift) & np.uint64(2**bits - 1)
    found: Array = codes.astype(np.int32)
    return found


def nibbles(packed: Array, high_first: bool) -> Array:
    """The two 4-bit codes of every byte, along the last axis."""
    import numpy as np

    raw = packed.view(np.uint8)
    pair = (raw >> 4, raw & 15) if high_first else (raw & 15, raw >> 4)
    found: Array = np.stack(pair, axis=-1).reshape(*raw.shape[:-1], -1)
    return found
