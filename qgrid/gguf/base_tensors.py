"""Whether a GGUF file holds the tensors of the checkpoint that it is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import phrases
from qgrid.gguf import _tensors, convert
from qgrid.gguf import file as gguf_file
from qgrid.gguf.file import Stored
from qgrid.types import Check

if TYPE_CHECKING:
    import numpy as np

    from qgrid.gguf._decoder import Decoder

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"  # a row for each token of the file
_ROPE_TABLE = "rope_freqs.weight"  # `constants` looks at it
_UNREAD = ".attn_rot_embd."  # frequencies that old converters stored, and llama.cpp skips
_TOLERANCE = 2e-3  # relative: half a step of BF16, the least that training could have changed
_ROWS = 32  # of a matrix, or those of one head
_NEAR = 0.9  # two bits leave a third of the size, zeros all of it, unrelated weights 1.4
_LEAST = 1e-5  # of the largest value: what F16 on the way may have cost a small one


def check_shapes(file: Path, source: Path) -> Check:
    """Every tensor of the base is in the file in its shape, and no further one in its layers.

    llama.cpp goes on without a bias, and takes the embedding for a head that is missing.
    """
    stored = gguf_file.read(file).tensors
    _, wanted = _planned(source, stored)
    wrong = [*_misshapen(stored, wanted), *_further(stored, wanted)]
    return _check("shapes", wrong, "the tensors of the base model", f"{len(wanted)} alike")


def _planned(
    source: Path, stored: Mapping[str, Stored]
) -> tuple[Decoder, Sequence[_tensors.Source]]:
    """The tensors that the base has; a file may keep a tied head once more."""
    decoder, wanted = convert.planned(source, "F32")
    if not decoder.tied or _HEAD not in stored:
        return decoder, wanted
    copies = [replace(each, name=_HEAD) for each in wanted if each.name == _EMBEDDING]
    return decoder, [*wanted, *copies]


def _misshapen(stored: Mapping[str, Stored], wanted: Sequence[_tensors.Source]) -> Iterator[str]:
    for each in wanted:
        free = 1 if each.name in {_EMBEDDING, _HEAD} else 0
        found = stored.get(each.name)
        if found is None:
            yield f"{each.name} is missing"
        elif found.shape[free:] != each.shape[free:]:
            yield f"{each.name} is {_times(found.shape)}, not {_times(each.shape)}"


def _further(stored: Mapping[str, Stored], wanted: Sequence[_tensors.Source]) -> Iterator[str]:
    known = {_ROPE_TABLE, *(each.name for each in wanted)}
    for name in sorted(stored.keys() - known):
        if _UNREAD not in name:
            yield f"{name} is not in the base"


def check_weights(file: Path, source: Path) -> Check:
    """The weights, in shapes that were found right, are those of the base as far as types tell.

    Norms, biases and rotary factors, which no quantizer rounds, are equal: one that was trained
    further shows there. The first rows of every matrix are near: other weights show, or an order
    of rows that belongs to another rotary embedding.
    """
    stored = gguf_file.read(file).tensors
    decoder, wanted = _planned(source, stored)
    found = ((each.name, _apart(file, stored[each.name], each, decoder)) for each in wanted)
    wrong = [f"{name} {apart}" for name, apart in found if apart is not None]
    return _check("weights", wrong, "the weights of the base model", f"{len(wanted)} alike")


def _apart(file: Path, found: Stored, wanted: _tensors.Source, decoder: Decoder) -> str | None:
    """How a tensor differs from the base's, or None."""
    import numpy as np

    expected = _tensors.load(wanted, decoder, _ROWS)
    values = _first_rows(file, found, len(expected))
    if values is None:
        return None
    if expected.ndim == 1:
        least = _LEAST * float(np.abs(expected).max())
        alike = np.allclose(values, expected, rtol=_TOLERANCE, atol=least)
        return None if alike else "has other values"
    apart, size = np.linalg.norm(values - expected), np.linalg.norm(expected)
    return None if apart <= _NEAR * size else f"is {apart / size:.2g} of its size apart"


def _first_rows(file: Path, found: Stored, rows: int) -> np.ndarray[Any, Any] | None:
    """Rows of a tensor (elements of a vector) decoded; None for a type that cannot be."""
    import gguf
    import numpy as np

    count = rows * found.num_weights // found.shape[0]
    size = count // found.type.block * found.type.nbytes
    raw = np.fromfile(file, np.uint8, size, offset=found.start)
    try:
        flat = gguf.dequantize(raw, gguf.GGMLQuantizationType(found.type.number))
    except NotImplementedError:
        return None
    values: np.ndarray[Any, Any] = flat.reshape(rows, *found.shape[1:])
    return values


def _times(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _check(name: str, wrong: Sequence[str], expected: str, good: str) -> Check:
    return Check(name, not wrong, expected, phrases.first(wrong) if wrong else good)
