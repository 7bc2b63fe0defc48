"""What `rtn`, `gptq` and `awq` share: integer weights through llmcompressor, packed checkpoints."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgrid import calibration, inspection
from qgrid.contracts import Built, Unsupported
from qgrid.methods import _checkpoint
from qgrid.types import Cell

FORMAT = "pack-quantized"
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
_SCHEME = re.compile(r"W(?P<bits>[2-8])A16(?P<asymmetric>_ASYM)?")
_SCHEME_GROUP = 128  # columns a scale covers in every integer preset of compressed-tensors
_BATCH_TOKENS = 4096
# The head and the routers of mixtures of experts stay at 16 bits.
_KEPT = ["lm_head", r"re:.*(mlp|block_sparse_moe)\.(gate|router|shared_expert_gate)$"]


@dataclass(frozen=True)
class Weights:
    """How a linear layer's weights are stored. `group_size` None: one scale a row."""

    bits: int
    group_size: int | None
    symmetric: bool


def weights(bits: int, options: Mapping[str, Any]) -> Weights:
    """Resolve the options; a preset scheme replaces `group_size` and `symmetric`."""
    scheme = options["scheme"]
    if scheme is None:
        return Weights(bits, options["group_size"], options["symmetric"])
    return Weights(bits, _SCHEME_GROUP, _parse(scheme)["asymmetric"] is None)


def stored_bits(stored: Weights, rows: int, columns: int) -> float:
    """Bits per weight of one packed layer: 32-bit words, bf16 scales, zero points, the shape."""
    groups = 1 if stored.group_size is None else -(-columns // stored.group_size)
    codes = rows * _words(columns * stored.bits)
    zeros = 0 if stored.symmetric else groups * _words(rows * stored.bits)
    return (codes + 16 * rows * groups + zeros + 128) / (rows * columns)


def _words(bits: int) -> int:
    """Bits in whole 32-bit words."""
    return 32 * -(-bits // 32)


def scheme_bits(scheme: str | None) -> int | None:
    """The width that a preset scheme implies.

    Raises:
        Unsupported: not a weight-only integer scheme.
    """
    return None if scheme is None else int(_parse(scheme)["bits"])


def _parse(scheme: str) -> re.Match[str]:
    found = _SCHEME.fullmatch(scheme)
    if not found:
        raise Unsupported(
            f"`method.scheme={scheme}` is not known here (has: W2A16, W3A16, W4A16, W8A16, "
            "W4A16_ASYM); leave it null and set `bits`, `method.group_size`, `method.symmetric`"
        )
    return found


def refusal(source: Path, stored: Weights) -> str | None:
    """Why the layers of `source` cannot be grouped so, with two ways out; None if they can."""
    if stored.group_size is None:
        return None
    linears = inspection.decoder_linears(inspection.read_headers(source))
    bad = {n: c for n, (_, c) in linears.items() if c % stored.group_size}
    if not bad:
        return None
    fits = next((g for g in (128, 64, 32, 16) if not any(c % g for _, c in linears.values())), None)
    first = ", ".join(f"{name} ({columns} columns)" for name, columns in list(bad.items())[:3])
    smaller = f"`method.group_size={fits}`, which divides all," if fits else "a divisor of all"
    return (
        f"`method.group_size={stored.group_size}` does not divide the columns of {len(bad)} layers: "
        f"{first}{', ...' if len(bad) > 3 else ''}; use {smaller} or `method.group_size=null` "
        "(one scale a row)"
    )


def quantize(
    cell: Cell,
    source: Path,
    out: Path,
    recipe: Callable[[Mapping[str, Any]], list[Any]],
    fallbacks: Callable[[Sequence[Any]], Sequence[str]] = lambda _: (),
) -> Built:
    """Run llmcompressor on `source` and write the packed checkpoint into `out`.

    `recipe` makes the modifiers from the arguments that describe the stored weights; `fallbacks`
    names the modules that the modifiers, after the run, did not treat by the method itself.
    """
    _checkpoint.refuse_quantized(source)
    stored = weights(cell.bits, cell.method.options)
    reason = refusal(source, stored)
    if reason:
        raise Unsupported(reason)
    tokenizer = _checkpoint.tokenizer(source, cell.model)
    drawn = calibration.draw(cell.calibration, tokenizer, cell.seed) if cell.calibration else None
    with _quiet():
        model = _checkpoint.load_16bit(source, cell.model)
        modifiers = _oneshot(model, tokenizer, recipe(_arguments(stored)), drawn)
        model.save_pretrained(out, save_compressed=True)
    _checkpoint.copy_tokenizer(source, out)
    ids = _checkpoint.probe(source, cell)
    return Built(
        probe=ids,
        reference=_checkpoint.logits(model, ids),
        module_methods=dict.fromkeys(fallbacks(modifiers), "rtn"),
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
) -> Sequence[Any]:
    """Apply the recipe; returns the modifiers that ran (llmcompressor copies those it is given)."""
    from llmcompressor import oneshot
    from llmcompressor.core import active_session

    batches = _batches(drawn.rows) if drawn else None
    with _without_pinning():
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe, dataset=batches)
    modifiers: Sequence[Any] = active_session().lifecycle.recipe.modifiers
    return modifiers


def _batches(rows: Sequence[Sequence[int]]) -> Any:
    """A loader of equally long rows, several at a time."""
    import torch
    from torch.utils.data import DataLoader

    size = max(1, _BATCH_TOKENS // len(rows[0]))
    ids = [torch.tensor(rows[i : i + size]) for i in range(0, len(rows), size)]
    return DataLoader(
        [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids],  # type: ignore[arg-type]
        batch_size=None,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings only, in the log of the stage; progress bars off."""
    from llmcompressor.logger import LoggerConfig, configure_logger

    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    configure_logger(LoggerConfig(console_log_level="ERROR", metrics_disabled=True))
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


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
