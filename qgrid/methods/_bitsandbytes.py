"""Quantization through bitsandbytes: while loading, and saved before the first forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qgrid.contracts import Built
from qgrid.methods import _checkpoint
from qgrid.types import Cell
from qgrid.weights import widths


def quantize(cell: Cell, source: Path, out: Path, settings: dict[str, Any]) -> Built:
    """Load `source` through a `BitsAndBytesConfig` of `settings` and write it into `out`.

    The checkpoint is saved at once: on a CPU the first forward pass repacks the weights, and a
    later save would silently write other numbers.
    """
    import torch
    from transformers import BitsAndBytesConfig

    _checkpoint.refuse_quantized(source)
    kept = widths.others(cell, source).get(widths.UNQUANTIZED, [])
    config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=[widths.HEAD, *kept])
    place = {"": 0} if torch.cuda.is_available() else {"": "cpu"}
    model = _checkpoint.load_16bit(source, cell.model, quantization_config=config, device_map=place)
    model.save_pretrained(out)
    _checkpoint.copy_tokenizer(source, out)
    ids = _checkpoint.probe(source, cell)
    return Built(probe=ids, reference=_checkpoint.logits(model, ids))
