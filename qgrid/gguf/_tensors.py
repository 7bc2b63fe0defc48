"""The weights of a checkpoint as GGUF tensors, read one at a time from safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qgrid.contracts import Unsupported
from qgrid.gguf import _decoder
from qgrid.weights import headers

if TYPE_CHECKING:
    import numpy as np

    from qgrid.gguf._decoder import Decoder
    from qgrid.types import Tensor

Dtype = Literal["F16", "BF16", "F32"]
BYTES: Mapping[str, int] = {"F16": 2, "BF16": 2, "F32": 4}
_STORED = frozenset({"F16", "BF16", "F32"})
_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a safetensors file."""

    path: Path
    start: int
    tensor: Tensor


@dataclass(frozen=True)
class Source:
    """A tensor of the GGUF file and what it is made of; `place` None: computed rotary factors."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    place: Place | None
    heads: int | None  # rows are reordered within each of so many heads


def places(source: Path) -> dict[str, Place]:
    """Every stored tensor of a checkpoint by name."""
    return {
        name: Place(path, start, tensor)
        for path in headers.weight_files(source)
        if path.suffix == ".safetensors"
        for name, (tensor, start) in headers.read_header(path).items()
    }


def refuse_other_tensors(decoder: Decoder, stored: Mapping[str, Place]) -> None:
    """Compare the stored tensors with those that the decoder has.

    Raises:
        Unsupported: a tensor is missing, is not known, or has another shape or dtype.
    """
    expected = _decoder.tensors(decoder)
    for name in sorted(expected.keys() - stored.keys()):
        raise Unsupported(
            f"the checkpoint has no tensor `{name}` in safetensors, which config.json asks for; "
            "complete it"
        )
    for name in sorted(stored.keys() - expected.keys()):
        if not _ignored(name, decoder):
            raise Unsupported(
                f"the checkpoint has a tensor `{name}` that {decoder.architecture.name} does not "
                "have in a GGUF file; use another method"
            )
    for name, shape in expected.items():
        _refuse_tensor(name, stored[name].tensor, shape)


def _ignored(name: str, decoder: Decoder) -> bool:
    """A buffer that old checkpoints stored, or the second copy of a tied head."""
    return name.endswith(".rotary_emb.inv_freq") or (decoder.tied and name == "lm_head.weight")


def _refuse_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise Unsupported(
            f"tensor `{name}` has the shape {tensor.shape}, config.json says {shape}; correct it"
        )
    if tensor.dtype not in _STORED:
        raise Unsupported(
            f"tensor `{name}` is stored as {tensor.dtype}; a GGUF file is made of "
            f"{', '.join(sorted(_STORED))}; give the 16-bit checkpoint"
        )


def plan(
    decoder: Decoder, stored: Mapping[str, Place], names: Mapping[str, str], dtype: Dtype
) -> list[Source]:
    """The tensors of the file in order; one-dimensional ones stay F32, as llama.cpp wants them.

    `names` maps Hugging Face modules to GGUF names.
    """
    planned = [
        Source(
            name=f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}",
            shape=shape,
            dtype=dtype if len(shape) > 1 else "F32",
            place=stored[name],
            heads=_reordered_heads(decoder, name),
        )
        for name, shape in _decoder.tensors(decoder).items()
    ]
    if decoder.rope is not None:
        shape = (decoder.head_dim // 2,)
        planned.append(Source("rope_freqs.weight", shape, "F32", None, None))
    return planned


def _reordered_heads(decoder: Decoder, name: str) -> int | None:
    if not decoder.architecture.pairs_rotate:
        return None
    if ".q_proj." in name:
        return decoder.heads
    return decoder.kv_heads if ".k_proj." in name else None


def in_order(rows: np.ndarray[Any, Any], decoder: Decoder, name: str) -> np.ndarray[Any, Any]:
    """Rows of the checkpoint's matrix `name` in the order that the file has them."""
    heads = _reordered_heads(decoder, name)
    return rows if heads is None else _pairs_side_by_side(rows, heads)


def load(source: Source, decoder: Decoder, rows: int | None = None) -> np.ndarray[Any, Any]:
    """The data of one tensor, in the bytes that the file holds.

    `rows`: only so many first rows of a matrix, or the first head where rows are reordered.

    Raises:
        ValueError: a value that F16 cannot hold.
    """
    import numpy as np

    if source.place is None:
        return np.array(_decoder.rope_factors(decoder), dtype=np.float32)
    raw, heads = _mapped(source.place), source.heads
    if rows is not None and raw.ndim > 1:
        raw, heads = raw[: rows if heads is None else decoder.head_dim], heads and 1
    if heads is not None:
        raw = _pairs_side_by_side(raw, heads)
    return _converted(raw, source)


def _mapped(place: Place) -> np.ndarray[Any, Any]:
    """Read lazily: the system brings in the pages of this tensor only."""
    import numpy as np

    kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[place.tensor.dtype]
    return np.memmap(place.path, kind, "r", place.start, place.tensor.shape)


def _pairs_side_by_side(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Row i of the first half of a head next to row i of its second half.

    Transformers rotates (i, i + d/2); llama.cpp rotates (2i, 2i + 1) in this architecture.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _converted(raw: np.ndarray[Any, Any], source: Source) -> np.ndarray[Any, Any]:
    import numpy as np

    assert source.place is not None
    if source.place.tensor.dtype == source.dtype:
        return np.ascontiguousarray(raw)
    wide = raw.astype(np.float32) if source.place.tensor.dtype != "BF16" else _widened(raw)
    if source.dtype == "F32":
        return wide
    return _half(wide, source.name) if source.dtype == "F16" else _narrowed(wide)


def _widened(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """BF16 bits as F32: the upper half of the same number."""
    import numpy as np

    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(wide: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """F32 as BF16 bits, rounded to the nearest, ties to even; a NaN stays one."""
    import numpy as np

    bits = wide.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(wide), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _half(wide: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    import numpy as np

    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    lost = np.isinf(half) & np.isfinite(wide)
    if lost.any():
        raise ValueError(
            f"tensor `{name}` has {int(lost.sum())} values beyond {_LARGEST_F16:g}, the largest "
            "of F16; use `method.type=BF16`"
        )
    return half
