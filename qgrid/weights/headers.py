"""Which tensors a folder's weights files hold, from their headers; no torch needed."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qgrid.gguf import file as gguf_file
from qgrid.gguf.file import TornFile
from qgrid.types import Tensor

__all__ = [
    "TornFile",
    "every_weight_file",
    "is_gguf",
    "read_header",
    "read_headers",
    "weight_files",
]

_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


def weight_files(folder: Path) -> list[Path]:
    """The weights that a folder is loaded from: safetensors; where it has none, its GGUF files.

    Transformers' choice: some checkpoints hold a second copy in another layout.
    """
    every = every_weight_file(folder)
    single, index = folder / _SINGLE, folder / f"{_SINGLE}.index.json"
    if single in every:
        return [single]
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [path for path in every if path.name in named]
    return every


def every_weight_file(folder: Path) -> list[Path]:
    """The safetensors files of a folder, read or not; where it has none, its GGUF files."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))


def is_gguf(folder: Path) -> bool:
    """Whether the weights of a folder are in GGUF files."""
    return any(path.suffix == ".gguf" for path in weight_files(folder))


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name.

    Raises:
        TornFile: a file's length contradicts its header.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= {name: tensor for name, (tensor, _) in read_header(path).items()}
    return found


def read_header(path: Path) -> dict[str, tuple[Tensor, int]]:
    """Tensors of one file by name, each with the position of its first byte.

    Raises:
        TornFile: the file's length contradicts its header.
    """
    if path.suffix != ".gguf":
        return _read_safetensors(path)
    return {
        name: (Tensor(stored.type.name, stored.shape, stored.nbytes), stored.start)
        for name, stored in gguf_file.read(path).tensors.items()
    }


def _read_safetensors(path: Path) -> dict[str, tuple[Tensor, int]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
            raise TornFile(f"{path.name} has {size} bytes and no safetensors header")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise TornFile(f"{path.name} has an unreadable safetensors header") from None
    header.pop("__metadata__", None)
    first = 8 + length
    end = first + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise TornFile(f"{path.name} has {size} bytes, its header says {end}")
    return {
        name: (_tensor(entry), first + entry["data_offsets"][0]) for name, entry in header.items()
    }


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    return Tensor(entry["dtype"], tuple(entry["shape"]), end - begin)
