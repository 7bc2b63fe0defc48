"""Where calibration documents lie: the lines of a file, or a data set of the hub."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qgrid import models

if TYPE_CHECKING:
    from qgrid.types import Calibration

Document = str | list[dict[str, Any]]  # a text, or the messages of a chat


class BadCalibration(ValueError):
    """A calibration that cannot be drawn; the message names the key and what to do."""


class Source(Protocol):
    """Documents by number, and all of them in seeded order."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Document: ...

    def shuffled(self, seed: int) -> Iterator[Document]:
        """All documents, in an order that the seed decides."""


def source(calibration: Calibration) -> Source:
    """The documents that a calibration names.

    Raises:
        BadCalibration: it names none, or they lack its field.
    """
    if calibration.path is not None:
        path = models.resource(calibration.path)
        return _File(list(_file_documents(calibration, path)))
    if calibration.dataset is not None:
        return _DataSet(calibration)
    raise BadCalibration(
        f"`calibration={calibration.name}` has neither `path` nor `dataset`; "
        "set one, e.g. `calibration.path=texts.jsonl`"
    )


class _File:
    def __init__(self, documents: list[Document]) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, number: int) -> Document:
        return self._documents[number]

    def shuffled(self, seed: int) -> Iterator[Document]:
        documents = list(self._documents)
        random.Random(seed).shuffle(documents)
        yield from documents


class _DataSet:
    def __init__(self, calibration: Calibration) -> None:
        from datasets import load_dataset

        name, _, config = str(calibration.dataset).partition(":")  # ORG/NAME or ORG/NAME:CONFIG
        split, files = calibration.split, calibration.data_files
        self._calibration = calibration
        self._where = f"{name}, {split}"
        self._rows = load_dataset(
            name,
            config or None,
            split=split,
            revision=calibration.revision,
            # of the split itself, without the part of it that is taken
            data_files=None if files is None else {split.partition("[")[0]: files},
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Document:
        return _field(self._calibration, self._rows[number], self._where)

    def shuffled(self, seed: int) -> Iterator[Document]:
        for row in self._rows.shuffle(seed=seed):
            yield _field(self._calibration, row, self._where)


def _file_documents(calibration: Calibration, path: Path) -> Iterator[Document]:
    """Lines of a JSONL file, or the paragraphs of a plain text."""
    if path.suffix not in {".jsonl", ".json"}:
        parts = path.read_text(encoding="utf-8").split("\n\n")
        yield from (part + "\n\n" for part in parts if part.strip())
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _field(calibration, json.loads(line), f"{path.name} line {number}")


def _field(calibration: Calibration, row: dict[str, Any], where: str) -> Document:
    if calibration.text_field not in row:
        raise BadCalibration(
            f"`calibration.text_field={calibration.text_field}` is not in {where} "
            f"(has: {', '.join(sorted(row))})"
        )
    value = row[calibration.text_field]
    return value if isinstance(value, list) else str(value)
