"""Which seeds and which contents belong to training, calibration and the held-out slices."""

from __future__ import annotations

import hashlib
import random
from enum import Enum

HELD_OUT_SHARE = 5  # one content in five is held out


class Split(Enum):
    """Where a document is used; the value is its range of seeds."""

    TRAIN = range(0, 1 << 40)
    HELD_OUT = range(1 << 40, 1 << 41)
    CALIBRATION = range(1 << 41, 1 << 42)


def document_rng(split: Split, index: int) -> random.Random:
    """The generator of document number `index` of a split."""
    return random.Random(split.value[index])


def stable_hash(text: str) -> int:
    """64-bit hash of a text, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def belongs(content: str, split: Split) -> bool:
    """Whether a problem with this content may occur in this split."""
    held_out = stable_hash(content) % HELD_OUT_SHARE == 0
    return held_out == (split is Split.HELD_OUT)
