"""Linear layers that an artifact leaves unquantized, and why; from what is stored, no torch.

That a layer of the decoder is left out unasked is an error that `verification` finds: here are the
layers that were to stay as they are.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from qgrid import models
from qgrid.layouts import FLOATS_16, FLOATS_32
from qgrid.types import Cell, Tensor
from qgrid.weights import inspection, widths
from qgrid.weights.ends import HEADS
from qgrid.weights.inspection import Contents

_EMBEDDING = re.compile(r"embe?d(?!_out)|(?:^|\.)(?:w[tp]e|shared)\.")
_PLAIN = FLOATS_16 | FLOATS_32
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def reasons(cell: Cell, contents: Contents, source: Path) -> dict[str, str]:
    """Layer, or pattern of layers -> why it is stored as it was; of a 16-bit cell nothing is told.

    `source` is the 16-bit checkpoint that `contents` was made of.
    """
    if cell.bits >= widths.UNQUANTIZED:
        return {}
    return {**_kept(cell, contents), **_outside(cell, contents, source)}


def _kept(cell: Cell, contents: Contents) -> dict[str, str]:
    """Layers of the decoder: those of `keep`, and others where the cell accepts them."""
    plain = {name: state for name, state in contents.modules.items() if state.method == "none"}
    asked = {name: widths.pattern(cell.method.options, name) for name in plain}
    found = Counter(pattern for pattern in asked.values() if pattern is not None)
    told = {
        pattern: f"`method.keep` leaves {_layers(count)} at {widths.UNQUANTIZED} bits"
        for pattern, count in found.items()
    }
    others = Counter(
        (_group(name), state.format) for name, state in plain.items() if asked[name] is None
    )
    for (group, format_), count in others.items():
        by = "`method.accept_fallback`: " if cell.method.options.get("accept_fallback") else ""
        told[group] = f"{by}{_layers(count)} stored as {format_}"
    return told


def _outside(cell: Cell, contents: Contents, source: Path) -> dict[str, str]:
    """The head, routers of mixtures of experts, and matrices outside the decoder's layers."""
    method, found = cell.method.name, {}
    original = inspection.read_headers(source) or contents.tensors
    if _is_tied(source) and any(_embeddings(contents.tensors)):
        found[widths.HEAD] = f"the output head is the embedding, which `{method}` leaves as it is"
    for name, count in Counter(map(_group, _left(original, contents))).items():
        if f"{name}.weight" in HEADS:
            found.setdefault(name, f"the output head, which `{method}` leaves as it is")
        elif inspection.is_router(name):
            found[name] = f"routers of experts, which `{method}` leaves as they are ({count})"
        else:
            found[name] = f"no linear layer of the decoder; `{method}` leaves it as it is ({count})"
    return found


def _left(original: Mapping[str, Tensor], contents: Contents) -> Iterator[str]:
    """Modules that are matrices of the base, none of its quantized part, and stored plainly."""
    for name, tensor in original.items():
        module = name.removesuffix(".weight")
        own = _is_matrix(name, tensor, inspection.FLOATS) and not _EMBEDDING.search(name)
        stored = contents.tensors.get(_stored_name(name, contents))
        if own and module not in contents.shapes and stored and stored.dtype in _PLAIN:
            yield module


def _stored_name(name: str, contents: Contents) -> str:
    """GGUF has a name of its own for the head."""
    return "output.weight" if contents.format == "gguf" and name in HEADS else name


def _embeddings(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Embeddings that are stored in floating point."""
    for name, tensor in tensors.items():
        if _is_matrix(name, tensor, _PLAIN) and _EMBEDDING.search(name):
            yield name


def _is_matrix(name: str, tensor: Tensor, dtypes: Collection[str]) -> bool:
    return name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in dtypes


def _is_tied(source: Path) -> bool:
    return models.tied(json.loads((source / "config.json").read_text(encoding="utf-8")))


def _group(module: str) -> str:
    """Equal layers of all blocks under one name: `model.layers.*.mlp.gate`."""
    return _NUMBER.sub(".*", module)


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
