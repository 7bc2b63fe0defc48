"""Quantization through llmcompressor: one run over the model, one compressed-tensors checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qgrid import calibration
from qgrid.contracts import Built
from qgrid.methods import _checkpoint
from qgrid.types import Cell
from qgrid.weights import inspection, widths

Scheme = Mapping[str, Mapping[str, Any]]  # `weights` and, if they are rounded, `input_activations`
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
# The head and the routers of mixtures of experts stay at 16 bits.
_KEPT = ["lm_head", f"re:{inspection.ROUTER}"]


def quantize(
    cell: Cell,
    source: Path,
    out: Path,
    scheme: Callable[[int], Scheme],
    recipe: Callable[[Mapping[str, Any]], list[Any]],
) -> Built:
    """Run llmcompressor on `source` and write the compressed checkpoint into `out`.

    `scheme` describes the layers of a width, `recipe` makes the modifiers from the arguments that
    describe them all.

    Raises:
        Unsupported: the source is quantized already.
    """
    _checkpoint.refuse_quantized(source)
    tokenizer = _checkpoint.tokenizer(source, cell.model)
    drawn = calibration.draw(cell.calibration, tokenizer, cell.seed) if cell.calibration else None
    _configure_log()
    model = _checkpoint.load_16bit(source, cell.model)
    _oneshot(model, tokenizer, recipe(_arguments(cell, source, scheme)), drawn)
    model.save_pretrained(out, save_compressed=True)
    _checkpoint.copy_tokenizer(source, out)
    ids = _checkpoint.probe(source, cell)
    return Built(
        probe=ids,
        reference=_checkpoint.logits(model, ids),
        calibration=drawn.summary if drawn else None,
    )


def _arguments(cell: Cell, source: Path, scheme: Callable[[int], Scheme]) -> dict[str, Any]:
    """Arguments that store every decoder linear in its width; names go before types."""
    groups = {"group_0": {"targets": ["Linear"], **scheme(cell.bits)}}
    kept = list(_KEPT)
    for bits, layers in widths.others(cell, source).items():
        if bits == widths.UNQUANTIZED:
            kept += layers
        else:
            groups[f"group_{bits}"] = {"targets": layers, **scheme(bits)}
    return {"config_groups": groups, "ignore": kept}


def _oneshot(
    model: Any, tokenizer: Any, recipe: list[Any], drawn: calibration.Drawn | None
) -> None:
    from llmcompressor import oneshot

    batches = _batches(drawn.rows) if drawn else None
    with _without_pinning():
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe, dataset=batches)


def _batches(rows: Sequence[Sequence[int]]) -> Any:
    """A loader of equally long rows, several at a time."""
    import torch
    from torch.utils.data import DataLoader

    ids = [torch.tensor(part) for part in calibration.batches(rows)]
    return DataLoader(
        [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids],  # type: ignore[arg-type]
        batch_size=None,
    )


def _configure_log() -> None:
    """Warnings only, in the log of the stage."""
    from llmcompressor.logger import LoggerConfig, configure_logger

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # llmcompressor asks for it
    configure_logger(LoggerConfig(console_log_level="WARNING"))


@contextlib.contextmanager
def _without_pinning() -> Iterator[None]:
    """Leave activations unpinned where there is no accelerator: pinning needs one and crashes."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    original = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = original
