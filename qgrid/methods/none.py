"""No quantization: the 16-bit checkpoint itself, linked, or saved as bf16 when it is wider."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qgrid import models
from qgrid.contracts import Built
from qgrid.methods import _checkpoint
from qgrid.types import Cell, MethodSupport

SUPPORTS = MethodSupport(
    bits=(16,),
    default_bits=16,
    produces={16: "safetensors-16bit"},
    packages=(),
    calibrated=False,
)


@dataclass(frozen=True)
class Options:
    """No options."""


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Link the files of a 16-bit checkpoint into `out`; convert and save any other."""
    _checkpoint.refuse_quantized(source)
    if _checkpoint.is_16bit(source):
        for path in models.checkpoint_files(source):
            (out / path.name).symlink_to(path.resolve())
        return Built()
    model = _checkpoint.load_16bit(source, cell.model)
    model.save_pretrained(out)
    _checkpoint.copy_tokenizer(source, out)
    ids = _checkpoint.probe(source, cell)
    return Built(probe=ids, reference=_checkpoint.logits(model, ids))
