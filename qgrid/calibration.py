"""Calibration text: what identifies it, and the seeded draw of token rows."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import models
from qgrid.files import sha256

if TYPE_CHECKING:
    from qgrid.files import HashCache
    from qgrid.types import Calibration


_BATCH_TOKENS = 2048


class BadCalibration(ValueError):
    """A calibration that cannot be drawn; the message names the key and what to do."""


@dataclass(frozen=True)
class Drawn:
    """Rows of equally many token ids, and the facts that the manifest keeps."""

    rows: tuple[tuple[int, ...], ...]
    summary: dict[str, Any]


def calibration_identity(calibration: Calibration, cache: HashCache | None) -> dict[str, Any]:
    """What of a calibration enters the artifact id: its content, not its name or place."""
    drawn = {"samples": calibration.samples, "length": calibration.length}
    if calibration.path is not None:
        path = models.resource(calibration.path)
        content = cache.sha256(path) if cache else sha256(path)
        return {"sha256": content, "text_field": calibration.text_field, **drawn}
    return {
        "dataset": calibration.dataset,
        "revision": calibration.revision,
        "split": calibration.split,
        "text_field": calibration.text_field,
        **drawn,
    }


def draw(calibration: Calibration, tokenizer: Any, seed: int) -> Drawn:
    """Documents in seeded order, tokenized and cut into `samples` rows of `length` tokens.

    Raises:
        BadCalibration: no source, no such field, or too little text.
    """
    wanted = calibration.samples * calibration.length
    ids: list[int] = []
    used = hashlib.sha256()
    for text in _texts(calibration, seed):
        if len(ids) >= wanted:
            break
        ids += tokenizer(text)["input_ids"]
        used.update(text.encode())
    if len(ids) < wanted:
        raise BadCalibration(
            f"`calibration={calibration.name}` holds {len(ids)} tokens, its samples x length ask "
            f"for {calibration.samples} x {calibration.length} = {wanted}; lower "
            "`calibration.samples` or `calibration.length`, or give more text"
        )
    length = calibration.length
    rows = tuple(tuple(ids[i : i + length]) for i in range(0, wanted, length))
    return Drawn(rows, _summary(calibration, seed, used.hexdigest()))


def batches(rows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Equally long rows, as many at a time as make some thousand tokens."""
    size = max(1, _BATCH_TOKENS // len(rows[0]))
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _summary(calibration: Calibration, seed: int, digest: str) -> dict[str, Any]:
    return {
        "source": calibration.path or calibration.dataset,
        "revision": calibration.revision,
        "sha256": digest,  # of the text that was drawn, in order
        "samples": calibration.samples,
        "length": calibration.length,
        "seed": seed,
    }


def _texts(calibration: Calibration, seed: int) -> Iterator[str]:
    """All documents in seeded order."""
    if calibration.path is not None:
        texts = list(_file_texts(calibration, models.resource(calibration.path)))
        random.Random(seed).shuffle(texts)
        yield from texts
    elif calibration.dataset is not None:
        yield from _hub_texts(calibration, seed)
    else:
        raise BadCalibration(
            f"`calibration={calibration.name}` has neither `path` nor `dataset`; "
            "set one, e.g. `calibration.path=texts.jsonl`"
        )


def _file_texts(calibration: Calibration, path: Path) -> Iterator[str]:
    """Lines of a JSONL file, or the paragraphs of a plain text."""
    if path.suffix not in {".jsonl", ".json"}:
        parts = path.read_text(encoding="utf-8").split("\n\n")
        yield from (part + "\n\n" for part in parts if part.strip())
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _field(calibration, json.loads(line), f"{path.name} line {number}")


def _hub_texts(calibration: Calibration, seed: int) -> Iterator[str]:
    from datasets import load_dataset

    name, _, config = str(calibration.dataset).partition(":")  # ORG/NAME or ORG/NAME:CONFIG
    part, revision = calibration.split, calibration.revision
    rows = load_dataset(name, config or None, split=part, revision=revision)
    for number, row in enumerate(rows.shuffle(seed=seed)):
        yield _field(calibration, row, f"{name}, row {number} of {part}")


def _field(calibration: Calibration, row: dict[str, Any], where: str) -> str:
    if calibration.text_field not in row:
        raise BadCalibration(
            f"`calibration.text_field={calibration.text_field}` is not in {where} "
            f"(has: {', '.join(sorted(row))})"
        )
    return str(row[calibration.text_field])
