"""Read a GGUF file: its metadata and where its tensors lie; the tensors stay on disk.

Layout (all little-endian): magic, version, number of tensors and of keys, the keys with their
values, the tensors' names, shapes, types and offsets, then the data, aligned.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from qgrid.gguf.types import BY_NUMBER, TensorType

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where `general.alignment` does not say otherwise
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_COUNT = struct.Struct("<Q")
_NUMBER = struct.Struct("<I")
_MAX_DIMENSIONS = 4


class TornFile(ValueError):
    """A weights file that is shorter or longer than its header says, or has no header."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `shape` is (rows, columns) for a matrix, `start` its first byte."""

    type: TensorType
    shape: tuple[int, ...]
    start: int

    @property
    def num_weights(self) -> int:
        """Weights of the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.num_weights // self.type.block * self.type.nbytes


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself.

    `metadata` holds single values, and the arrays that were asked for.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def histogram(self) -> dict[str, int]:
        """Number of tensors of each type, most frequent first."""
        return dict(Counter(t.type.name for t in self.tensors.values()).most_common())


@dataclass
class _Cursor:
    """A place in the file that moves on as values are read."""

    data: mmap.mmap
    place: int = 0
    arrays: frozenset[str] = field(default_factory=frozenset)

    def scalar(self, layout: struct.Struct) -> Any:
        """The next number or flag."""
        value = layout.unpack_from(self.data, self.place)[0]
        self.place += layout.size
        return value

    def text(self) -> str:
        """The next string: its length, then UTF-8."""
        length = self.scalar(_COUNT)
        raw = self.data[self.place : self.place + length]
        if len(raw) != length:
            raise struct.error("a string ends behind the file")
        self.place += length
        return raw.decode("utf-8", errors="replace")

    def skip_texts(self, count: int) -> None:
        """Move behind `count` strings: a vocabulary has hundreds of thousands."""
        place, data, unpack = self.place, self.data, _COUNT.unpack_from
        for _ in range(count):
            place += 8 + unpack(data, place)[0]
        self.place = place


def read(path: Path, arrays: Collection[str] = ()) -> Header:
    """The header of a GGUF file, with the values of the `arrays` that are named.

    Raises:
        TornFile: no GGUF header, or a length that contradicts it.
    """
    size = path.stat().st_size
    if size < len(MAGIC) + 20:
        raise TornFile(f"{path.name} has {size} bytes and no GGUF header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, arrays=frozenset(arrays))
        try:
            metadata, infos = _header(cursor, path.name)
        except (struct.error, OverflowError, IndexError):
            raise TornFile(
                f"{path.name} has {size} bytes, which end within its GGUF header"
            ) from None
    alignment = _alignment(metadata, path.name)
    first = _aligned(cursor.place, alignment)
    tensors = {name: Stored(kind, shape, first + at) for name, (kind, shape, at) in infos.items()}
    end = _end(tensors, first, alignment, path.name)
    if not end <= size <= _aligned(end, alignment):  # a writer may pad the last tensor
        raise TornFile(f"{path.name} has {size} bytes, its header says {end}")
    return Header(metadata, tensors)


def _alignment(metadata: Mapping[str, Any], file: str) -> int:
    found = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(found, int) or found < 1 or found & (found - 1):
        raise TornFile(f"{file}: `general.alignment` is {found!r}, which is no power of two")
    return found


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _end(tensors: Mapping[str, Stored], first: int, alignment: int, file: str) -> int:
    """The byte behind the last tensor; each begins where the one before it ends."""
    end = first
    for name, tensor in tensors.items():
        if tensor.start != _aligned(end, alignment):
            raise TornFile(
                f"{file}: tensor {name} begins at byte {tensor.start}, not at "
                f"{_aligned(end, alignment)} behind the one before it"
            )
        end = tensor.start + tensor.nbytes
    return end


_Info = tuple[TensorType, tuple[int, ...], int]  # offset from the start of the data


def _header(cursor: _Cursor, name: str) -> tuple[dict[str, Any], dict[str, _Info]]:
    """Metadata and tensors, in the order of the file."""
    start = cursor.data[: len(MAGIC)]
    cursor.place = len(MAGIC)
    version = cursor.scalar(_NUMBER)
    if start != MAGIC or version not in _VERSIONS:
        told = "no GGUF header" if start != MAGIC else f"GGUF version {version}"
        raise TornFile(f"{name} has {told}; GGUF versions 2 and 3 are read")
    num_tensors, num_keys = cursor.scalar(_COUNT), cursor.scalar(_COUNT)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = _fresh(cursor.text(), metadata, f"{name}: the key")
        metadata[key] = _value(cursor, key, cursor.scalar(_NUMBER))
    infos: dict[str, _Info] = {}
    for _ in range(num_tensors):
        tensor = _fresh(cursor.text(), infos, f"{name}: the tensor")
        infos[tensor] = _tensor(cursor, name, tensor)
    return {key: value for key, value in metadata.items() if value is not None}, infos


def _fresh(name: str, known: Collection[str], what: str) -> str:
    """A name that did not come before: llama.cpp refuses a file with two of one name."""
    if name in known:
        raise TornFile(f"{what} `{name}` comes twice")
    return name


def _value(cursor: _Cursor, key: str, kind: int) -> Any:
    """A value of the metadata; None for an array that nobody asked for."""
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        return _array(cursor, key)
    if kind not in _SCALARS:
        raise TornFile(f"the key `{key}` has the unknown GGUF value type {kind}")
    return cursor.scalar(_SCALARS[kind])


def _array(cursor: _Cursor, key: str) -> tuple[Any, ...] | None:
    kind, count = cursor.scalar(_NUMBER), cursor.scalar(_COUNT)
    wanted = key in cursor.arrays
    if kind == _STRING:
        if wanted:
            return tuple(cursor.text() for _ in range(count))
        cursor.skip_texts(count)
        return None
    if kind not in _SCALARS:
        raise TornFile(f"the key `{key}` is an array of the unknown GGUF value type {kind}")
    layout = _SCALARS[kind]
    start = cursor.place
    cursor.place += layout.size * count
    if not wanted:
        return None
    values = struct.unpack_from(f"<{count}{layout.format[1:]}", cursor.data, start)
    return tuple(values)


def _tensor(cursor: _Cursor, file: str, tensor: str) -> _Info:
    dimensions = cursor.scalar(_NUMBER)
    if not 0 < dimensions <= _MAX_DIMENSIONS:
        raise TornFile(f"{file}: tensor {tensor} has {dimensions} dimensions")
    shape = tuple(cursor.scalar(_COUNT) for _ in range(dimensions))[::-1]
    number, offset = cursor.scalar(_NUMBER), cursor.scalar(_COUNT)
    if number not in BY_NUMBER:
        raise TornFile(f"{file}: tensor {tensor} has the unknown GGUF type {number}")
    kind = BY_NUMBER[number]
    if shape[-1] % kind.block:
        raise TornFile(
            f"{file}: tensor {tensor} has rows of {shape[-1]} weights; {kind.name} stores "
            f"blocks of {kind.block}"
        )
    return kind, shape, offset
