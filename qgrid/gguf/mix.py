"""Which tensor type llama.cpp's quantizer gives each linear layer of a dense decoder.

The facts are those of its version 0.3.36 of llama-cpp-python; a test holds every one against the
library's own dry run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qgrid.gguf.types import TENSOR_TYPES, FileType, stored_as

_PLACE = re.compile(r"^blk\.(\d+)\.(\w+)\.weight$")
_MANY_QUERIES = 4  # heads that share a key head, from which values deserve more bits
_LAYERS_70B = 80
_OUTPUT = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
_MORE = ("Q4_K_M", "Q5_K_M")  # these give Q6_K where it tells most


@dataclass(frozen=True)
class Shape:
    """What of a model decides: its layers, its query heads and its key heads."""

    layers: int
    heads: int
    kv_heads: int

    @property
    def queries(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


def types(
    file_type: FileType, shape: Shape, columns: Mapping[str, int], imatrix: bool
) -> dict[str, str]:
    """The type of each tensor in `columns` (name -> weights of a row), with what rows allow."""
    return {
        name: stored_as(meant(file_type, shape, name, imatrix), width)
        for name, width in columns.items()
    }


def meant(file_type: FileType, shape: Shape, tensor: str, imatrix: bool) -> str:
    """The type that a linear layer gets where its rows are whole blocks."""
    found = _PLACE.match(tensor)
    layer, role = (int(found[1]), found[2]) if found else (0, "")
    if role == "attn_v":
        return _values(file_type, shape, layer)
    if role == "ffn_down":
        return _down(file_type, shape.layers, layer, imatrix)
    if role == "attn_output":
        return _OUTPUT.get(file_type.name, file_type.base)
    return file_type.base


def _values(file_type: FileType, shape: Shape, layer: int) -> str:
    """The layer that makes the values: small where queries share heads, and it tells most."""
    chosen = _values_before_70b(file_type, shape, layer)
    large = shape.layers == _LAYERS_70B and shape.queries > 1
    raised = large and chosen in {"Q3_K", "Q4_K"} and file_type.name != "IQ2_XS"
    return "Q5_K" if raised else chosen


def _values_before_70b(file_type: FileType, shape: Shape, layer: int) -> str:
    name, shared = file_type.name, shape.queries >= _MANY_QUERIES
    if name in {"Q2_K", "IQ2_XS"}:
        alone = "Q3_K" if name == "Q2_K" else "Q2_K"
        return "Q4_K" if shared else alone
    if name in {"IQ4_NL", "IQ4_XS"} and shared:
        return "Q5_K"
    if name in _MORE and _tells_most(layer, shape.layers):
        return "Q6_K"
    early = {"Q3_K_M": (2, "Q5_K", "Q4_K"), "Q4_K_S": (4, "Q5_K", "Q4_K")}
    if name in early:
        first, more, less = early[name]
        return more if layer < first else less
    return {"IQ3_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name, file_type.base)


def _down(file_type: FileType, layers: int, layer: int, imatrix: bool) -> str:
    """The last layer of the feed-forward network."""
    name = file_type.name
    if name in _MORE:
        return "Q6_K" if _tells_most(layer, layers) else file_type.base
    if name == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    raised = {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}
    if layer < layers // 8:
        raised |= {"Q4_K_S": "Q5_K", "IQ3_M": "Q4_K", "IQ2_XS": "Q2_K"}
        raised |= {"Q4_0": "Q4_1"} if imatrix else {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
    return raised.get(name, file_type.base)


def _tells_most(layer: int, layers: int) -> bool:
    """The first and last eighth, and every third layer between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def bits(types_of: Mapping[str, str], weights: Mapping[str, int]) -> float:
    """Mean stored bits of tensors: `types_of` and `weights` by name."""
    total = sum(TENSOR_TYPES[types_of[name]].bits * count for name, count in weights.items())
    return total / sum(weights.values())


def fallbacks(
    file_type: FileType, shape: Shape, columns: Mapping[str, int], imatrix: bool
) -> dict[str, str]:
    """The type of each tensor whose rows are not whole blocks of the type that is meant for it."""
    stored = types(file_type, shape, columns, imatrix)
    return {n: t for n, t in stored.items() if t != meant(file_type, shape, n, imatrix)}
