"""The embedding and the head of an artifact: no method here changes them, so they are the base's.

A model that was loaded without its head has a random one, and saves it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import models, phrases
from qgrid.published._reading import Tensors
from qgrid.types import Check
from qgrid.weights import inspection

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_BLOCK = re.compile(r"\.(?:layers|h|blocks|block)\.\d+\.")
HEADS = ("lm_head.weight", "output.weight")
ROWS = 512  # of a matrix that is not quantized, spread over it
_ROUNDED = 2**-7  # in another 16-bit dtype than the base's
_LEAST = 1e-5  # of the largest value: what fp16 may have cost a small one


def check(folder: Path, base: Path) -> Check:
    """Embedding and head against those of `base`, as far as both are stored as safetensors."""
    found, expected = Tensors(folder), Tensors(base)
    wrong = [*_changed(found, expected), *_further(found, expected, base)]
    goal = "the base model's embedding and head"
    if wrong:
        return Check("ends", False, goal, phrases.first(wrong))
    stored = _matrices(found)
    compared = [name for name, shape in _matrices(expected).items() if stored.get(name) == shape]
    if not compared:
        return Check("ends", False, goal, "none that can be compared", fatal=False)
    return Check("ends", True, goal, f"{', '.join(compared)} as in the base")


def _matrices(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Float matrices outside the decoder's layers."""
    return {
        name: tensor.shape
        for name, tensor in tensors.headers.items()
        if len(tensor.shape) == 2 and tensor.dtype in inspection.FLOATS and not _BLOCK.search(name)
    }


def _changed(found: Tensors, expected: Tensors) -> Iterator[str]:
    stored = _matrices(found)
    for name, shape in _matrices(expected).items():
        if stored.get(name) != shape:
            continue  # quantized, or tied; where it is missing, nothing loads
        values, wanted = found.array(name, ROWS), expected.array(name, ROWS)
        if not near(values, wanted):
            yield f"{name} has other values"


def near(found: Array, base: Array) -> bool:
    """Whether two arrays are the same, as far as different 16-bit dtypes hold them."""
    import numpy as np

    least = _LEAST * float(np.abs(base).max(initial=0))
    return bool(np.allclose(found, base, rtol=_ROUNDED, atol=least))


def _further(found: Tensors, expected: Tensors, base: Path) -> Iterator[str]:
    """Heads that the base does not store; where it shares its embedding's, one may be a copy."""
    import numpy as np

    if not expected.headers:  # pickles hold tensors that are not read here
        return
    stored = _matrices(found)
    tied = models.tied(json.loads((base / "config.json").read_text(encoding="utf-8")))
    for name in HEADS:
        if name not in stored or name in expected.headers:
            continue
        shared = [key for key, shape in stored.items() if key != name and shape == stored[name]]
        head = found.array(name, ROWS)
        same = any(np.array_equal(head, found.array(key, ROWS)) for key in shared)
        if tied and not same:
            yield f"{name} is not the embedding, which the base model's head is"
        elif not tied:
            yield f"{name} is not in the base model"
