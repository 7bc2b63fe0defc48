"""No quantization: the 16-bit checkpoint itself, linked, or saved in another floating-point type.

`dtype=auto` is the baseline of every comparison: what is stored at 16 bits, and bf16 of anything
wider. The other types show what rounding to them costs by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qgrid import models
from qgrid.contracts import Built, Unsupported
from qgrid.methods import _checkpoint
from qgrid.types import Cell, MethodSupport
from qgrid.weights import inspection

if TYPE_CHECKING:
    import torch

SUPPORTS = MethodSupport(
    bits=(16,),
    default_bits=16,
    produces={16: "safetensors-16bit"},
    packages=(),
    calibrated=False,
)
_WIDE = MethodSupport(
    bits=(32,),
    default_bits=32,
    produces={32: "safetensors-32bit"},
    packages=(),
    calibrated=False,
)
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Options:
    """`dtype` of the weights; `auto`: as stored, and bf16 where that has 32 bits."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


def support(options: Mapping[str, Any]) -> MethodSupport:
    """What is made in the dtype that is asked for."""
    return _WIDE if options.get("dtype") == "float32" else SUPPORTS


def resolved(bits: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing where nothing is asked for, so that such a cell is the baseline."""
    return {key: value for key, value in options.items() if value != "auto"}


def bits_per_weight(bits: int, options: Mapping[str, Any]) -> float:
    """Stored bits of every weight."""
    return float(bits)


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Stored bits per weight of one layer: its width."""
    return float(bits)


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Link the files of a checkpoint that is stored as asked into `out`; convert any other.

    Raises:
        Unsupported: the source is quantized, or fp16 cannot hold its weights.
    """
    _checkpoint.refuse_quantized(source)
    wanted = Options(**cell.method.options).dtype
    if _is_stored(source, wanted):
        for path in models.checkpoint_files(source):
            (out / path.name).symlink_to(path.resolve())
        return Built()
    model = _converted(cell, source, wanted)
    model.save_pretrained(out)
    _checkpoint.copy_tokenizer(source, out)
    ids = _checkpoint.probe(source, cell)
    return Built(probe=ids, reference=_checkpoint.logits(model, ids))


def _is_stored(source: Path, dtype: str) -> bool:
    if dtype == "auto":
        return _checkpoint.is_16bit(source)
    found = {tensor.dtype for tensor in inspection.read_headers(source).values()}
    return found == {_STORED[dtype]}


def _converted(cell: Cell, source: Path, dtype: str) -> Any:
    """The model in another dtype than it is stored in.

    Raises:
        Unsupported: fp16 cannot hold its weights.
    """
    import torch

    if dtype == "auto":
        return _checkpoint.load_16bit(source, cell.model)
    model = _checkpoint.load_16bit(source, cell.model, dtype=getattr(torch, dtype))
    if dtype == "float16":
        _refuse_overflow(dict(model.named_parameters()))
    return model


def _refuse_overflow(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse fp16 weights that became infinite as they were cast.

    What is no number was none before: the check `finite` tells that of any dtype.
    """
    import torch

    beyond = [name for name, value in weights.items() if bool(torch.isinf(value).any())]
    if beyond:
        exceed = "1 tensor exceeds" if len(beyond) == 1 else f"{len(beyond)} tensors exceed"
        raise Unsupported(
            f"`method.dtype=float16` holds at most {torch.finfo(torch.float16).max:.0f}, which "
            f"{exceed}: {', '.join(beyond[:3])}"
            f"{', ...' if len(beyond) > 3 else ''}; use `method.dtype=bfloat16`"
        )
