"""The embedding and the head of an artifact: no method here changes them, so they are the base's.

A model that was loaded without its head has a random one, and saves it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from qgrid import inspection, models, phrases
from qgrid.published._reading import Tensors
from qgrid.types import Check

_BLOCK = re.compile(r"\.(?:layers|h|blocks|block)\.\d+\.")
_HEADS = ("lm_head.weight", "output.weight")
_ROWS = 512  # spread over the vocabulary
_ROUNDED = 2**-7  # in another 16-bit dtype than the base's
_LEAST = 1e-5  # of the largest value: what fp16 may have cost a small one


def check(folder: Path, base: Path) -> Check:
    """Embedding and head against those of `base`, as far as both are stored as safetensors."""
    found, expected = Tensors(folder), Tensors(base)
    wrong = [*_changed(found, expected), *_further(found, expected, base)]
    goal = "the base model's embedding and head"
    return Check("ends", not wrong, goal, phrases.first(wrong) if wrong else goal)


def _matrices(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Float matrices outside the decoder's layers."""
    return {
        name: tensor.shape
        for name, tensor in tensors.headers.items()
        if len(tensor.shape) == 2 and tensor.dtype in inspection.FLOATS and not _BLOCK.search(name)
    }


def _changed(found: Tensors, expected: Tensors) -> Iterator[str]:
    import numpy as np

    stored = _matrices(found)
    for name, shape in _matrices(expected).items():
        if stored.get(name) != shape:
            continue  # quantized, or tied; where it is missing, nothing loads
        values, wanted = found.array(name, _ROWS), expected.array(name, _ROWS)
        least = _LEAST * float(np.abs(wanted).max(initial=0))
        if not np.allclose(values, wanted, rtol=_ROUNDED, atol=least):
            yield f"{name} has other values"


def _further(found: Tensors, expected: Tensors, base: Path) -> Iterator[str]:
    tied = models.tied(json.loads((base / "config.json").read_text(encoding="utf-8")))
    if tied or not expected.headers:  # pickles hold tensors that are not read here
        return
    for name in _HEADS:
        if name in _matrices(found) and name not in expected.headers:
            yield f"{name} is not in the base model"
