"""The types of GGUF: how tensors are stored, and which mix of them each file type means.

Numbers and block layouts are llama.cpp's (`ggml.h`, `llama.h`), the mixes those of its quantizer
for dense Llama-like models; `mix.py` tells them layer by layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Name = Literal[
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_0",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
    "IQ4_XS",
    "IQ4_NL",
    "IQ3_M",
    "IQ2_XS",
    "F16",
    "BF16",
]


@dataclass(frozen=True)
class TensorType:
    """How a tensor is stored: blocks of `block` weights of a row in `nbytes` bytes.

    `scales` are the places of a block's fp16 scales, where it has any.
    """

    number: int
    name: str
    block: int
    nbytes: int
    scales: tuple[int, ...] = ()

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.block


@dataclass(frozen=True)
class FileType:
    """What a file type means.

    `base` is the type of most linear weights; `mix` holds every type that the quantizer gives to
    linear layers of a dense model. `bits_per_weight` is that of a whole large file, embedding and
    head included.
    """

    name: str
    number: int
    bits: int  # nominal
    base: str
    others: tuple[str, ...]
    bits_per_weight: float
    needs_imatrix: bool = False

    @property
    def mix(self) -> frozenset[str]:
        """All tensor types that its linear layers may have."""
        return frozenset((self.base, *self.others))


_TENSOR_TYPES = (
    TensorType(0, "F32", 1, 4),
    TensorType(1, "F16", 1, 2),
    TensorType(2, "Q4_0", 32, 18, (0,)),
    TensorType(3, "Q4_1", 32, 20, (0, 2)),
    TensorType(6, "Q5_0", 32, 22, (0,)),
    TensorType(7, "Q5_1", 32, 24, (0, 2)),
    TensorType(8, "Q8_0", 32, 34, (0,)),
    TensorType(10, "Q2_K", 256, 84, (80, 82)),
    TensorType(11, "Q3_K", 256, 110, (108,)),
    TensorType(12, "Q4_K", 256, 144, (0, 2)),
    TensorType(13, "Q5_K", 256, 176, (0, 2)),
    TensorType(14, "Q6_K", 256, 210, (208,)),
    TensorType(16, "IQ2_XXS", 256, 66, (0,)),
    TensorType(17, "IQ2_XS", 256, 74, (0,)),
    TensorType(18, "IQ3_XXS", 256, 98, (0,)),
    TensorType(19, "IQ1_S", 256, 50, (0,)),
    TensorType(20, "IQ4_NL", 32, 18, (0,)),
    TensorType(21, "IQ3_S", 256, 110, (0,)),
    TensorType(22, "IQ2_S", 256, 82, (0,)),
    TensorType(23, "IQ4_XS", 256, 136, (0,)),
    TensorType(24, "I8", 1, 1),
    TensorType(25, "I16", 1, 2),
    TensorType(26, "I32", 1, 4),
    TensorType(27, "I64", 1, 8),
    TensorType(28, "F64", 1, 8),
    TensorType(29, "IQ1_M", 256, 56),
    TensorType(30, "BF16", 1, 2),
    TensorType(34, "TQ1_0", 256, 54, (52,)),
    TensorType(35, "TQ2_0", 256, 66, (64,)),
    TensorType(39, "MXFP4", 32, 17),
    TensorType(40, "NVFP4", 64, 36),
)
TENSOR_TYPES: Mapping[str, TensorType] = {kind.name: kind for kind in _TENSOR_TYPES}
BY_NUMBER: Mapping[int, TensorType] = {kind.number: kind for kind in _TENSOR_TYPES}
PLAIN = frozenset({"F16", "BF16", "F32", "F64"})  # a linear layer so stored is not quantized

# Whole-file bits per weight are those of published Llama-3.1-8B files (llama.cpp's table of its
# quantizer); for types that it lacks (Q4_0, IQ4_NL, IQ4_XS, IQ3_M, IQ2_XS) the sum over that
# model's tensors of the bits that `mix.py` gives each.
_FILE_TYPES = (
    FileType("F16", 1, 16, "F16", (), 16.0),
    FileType("Q4_0", 2, 4, "Q4_0", ("Q4_1",), 4.64),
    FileType("Q8_0", 7, 8, "Q8_0", (), 8.50),
    FileType("Q2_K", 10, 2, "Q2_K", ("Q3_K", "Q4_K", "Q5_K"), 3.16),
    FileType("Q3_K_S", 11, 3, "Q3_K", ("Q5_K",), 3.64),
    FileType("Q3_K_M", 12, 3, "Q3_K", ("Q4_K", "Q5_K"), 4.00),
    FileType("Q3_K_L", 13, 3, "Q3_K", ("Q5_K",), 4.30),
    FileType("Q4_K_S", 14, 4, "Q4_K", ("Q5_K",), 4.67),
    FileType("Q4_K_M", 15, 4, "Q4_K", ("Q6_K", "Q5_K"), 4.89),
    FileType("Q5_K_M", 17, 5, "Q5_K", ("Q6_K",), 5.70),
    FileType("Q6_K", 18, 6, "Q6_K", (), 6.56),
    FileType("IQ2_XS", 20, 2, "IQ2_XS", ("Q2_K", "Q4_K"), 2.59, needs_imatrix=True),
    FileType("IQ4_NL", 25, 4, "IQ4_NL", ("Q5_K",), 4.68),
    FileType("IQ3_M", 27, 3, "IQ3_S", ("Q4_K", "Q5_K"), 3.76),
    FileType("IQ4_XS", 30, 4, "IQ4_XS", ("Q5_K",), 4.46),
    FileType("BF16", 32, 16, "BF16", (), 16.0),
)
FILE_TYPES: Mapping[str, FileType] = {kind.name: kind for kind in _FILE_TYPES}
BY_FILE_TYPE: Mapping[int, FileType] = {kind.number: kind for kind in _FILE_TYPES}

# What the quantizer takes where a row is no multiple of the block; F16 where that does not fit.
_FALLBACKS = {
    "IQ2_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_IN_NAME = re.compile(
    rf"(?:^|[-._])({'|'.join(sorted(FILE_TYPES, key=len, reverse=True))})(?=[-._]|$)",
    re.IGNORECASE,
)


def stored_as(asked: str, columns: int) -> str:
    """The tensor type that rows of `columns` weights get where `asked` is meant for them."""
    if columns % TENSOR_TYPES[asked].block == 0:
        return asked
    instead = _FALLBACKS.get(asked, asked)
    return instead if columns % TENSOR_TYPES[instead].block == 0 else "F16"


def named(file_name: str) -> FileType | None:
    """The file type that a file's name tells, such as Q4_K_M in `model-Q4_K_M.gguf`."""
    found = _IN_NAME.findall(file_name.removesuffix(".gguf"))
    return FILE_TYPES[found[-1].upper()] if found else None
