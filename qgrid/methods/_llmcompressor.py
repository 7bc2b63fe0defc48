"""What `rtn`, `gptq` and `awq` share: integer weights through llmcompressor, packed checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from qgrid import calibration, inspection, models
from qgrid.contracts import Built, Unsupported
from qgrid.methods import _checkpoint
from qgrid.types import Cell

Scheme = Literal["W2A16", "W3A16", "W4A16", "W8A16", "W4A16_ASYM"]  # presets of the library
FORMAT = "pack-quantized"
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
_SCHEME_GROUP = 128  # columns a scale covers in every integer preset of compressed-tensors
_GROUPS = (128, 64, 32, 16)  # to suggest
# The head and the routers of mixtures of experts stay at 16 bits.
_KEPT = ["lm_head", r"re:.*(mlp|block_sparse_moe)\.(gate|router|shared_expert_gate)$"]


@dataclass(frozen=True)
class Weights:
    """How a linear layer's weights are stored. `group_size` None: one scale a row."""

    bits: int
    group_size: int | None
    symmetric: bool


def option_bits(options: Mapping[str, Any]) -> int | None:
    """The width that `scheme` implies, if any."""
    scheme = options["scheme"]
    return None if scheme is None else int(scheme[1])


def linear_bits_per_weight(bits: int, options: Mapping[str, Any]) -> float:
    """Stored bits of a large linear layer, scales and zero points included."""
    return stored_bits(bits, options, 4096, 4096)


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Bits per weight of one packed layer: 32-bit words, 16-bit scales, zero points, the shape."""
    stored = weights(bits, options)
    groups = 1 if stored.group_size is None else -(-columns // stored.group_size)
    codes = rows * _words(columns * bits)
    zeros = 0 if stored.symmetric else groups * _words(rows * bits)
    return (codes + 16 * rows * groups + zeros + 128) / (rows * columns)


def refusal(cell: Cell) -> str | None:
    """Why the cell's model cannot be stored so, with two ways out; None if it can.

    Also None while the model is not on this machine: `quantize` asks again.
    """
    source = models.located(cell.model)
    if source is None or not (source / "config.json").is_file():
        return None
    return _indivisible(source, weights(cell.bits, cell.method.options).group_size)


def weights(bits: int, options: Mapping[str, Any]) -> Weights:
    """Resolve the options; a preset scheme replaces `group_size` and `symmetric`."""
    scheme = options["scheme"]
    if scheme is None:
        return Weights(bits, options["group_size"], options["symmetric"])
    return Weights(bits, _SCHEME_GROUP, symmetric=not scheme.endswith("_ASYM"))


def _words(bits: int) -> int:
    """Bits in whole 32-bit words."""
    return 32 * -(-bits // 32)


@cache
def _indivisible(source: Path, group_size: int | None) -> str | None:
    """Which layers a group does not divide, and the two ways out."""
    linears = inspection.decoder_linears(inspection.read_headers(source))
    columns = {name: columns for name, (_, columns) in linears.items()}
    bad = [name for name, width in columns.items() if group_size and width % group_size]
    if not bad:
        return None
    fits = next((g for g in _GROUPS if not any(width % g for width in columns.values())), None)
    first = ", ".join(f"{name} ({columns[name]} columns)" for name in bad[:3])
    smaller = f"`method.group_size={fits}` (divides all)" if fits else "a divisor of all"
    return (
        f"`method.group_size={group_size}` does not divide the columns of {len(bad)} "
        f"layers: {first}{', ...' if len(bad) > 3 else ''}; use {smaller} or "
        "`method.group_size=null` (one scale a row)"
    )


def quantize(
    cell: Cell,
    source: Path,
    out: Path,
    recipe: Callable[[Mapping[str, Any]], list[Any]],
) -> Built:
    """Run llmcompressor on `source` and write the packed checkpoint into `out`.

    `recipe` makes the modifiers from the arguments that describe the stored weights.
    """
    _checkpoint.refuse_quantized(source)
    stored = weights(cell.bits, cell.method.options)
    reason = _indivisible(source, stored.group_size)
    if reason is not None:
        raise Unsupported(reason)
    tokenizer = _checkpoint.tokenizer(source, cell.model)
    drawn = calibration.draw(cell.calibration, tokenizer, cell.seed) if cell.calibration else None
    _configure_log()
    model = _checkpoint.load_16bit(source, cell.model)
    _oneshot(model, tokenizer, recipe(_arguments(stored)), drawn)
    model.save_pretrained(out, save_compressed=True)
    _checkpoint.copy_tokenizer(source, out)
    ids = _checkpoint.probe(source, cell)
    return Built(
        probe=ids,
        reference=_checkpoint.logits(model, ids),
        calibration=drawn.summary if drawn else None,
    )


def _arguments(stored: Weights) -> dict[str, Any]:
    """Arguments of a modifier that stores all decoder linears as `stored` says."""
    grouped = stored.group_size is not None
    args = {
        "num_bits": stored.bits,
        "type": "int",
        "symmetric": stored.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": stored.group_size,
    }
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
        "ignore": _KEPT,
    }


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
