"""Results per item in a few characters each, so that a lock can say which of them differ."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from qgrid.reproduction.lock import Answers

_BYTES = 3  # of an item's hash: four characters in base64
_CHARACTERS = 4
_RIGHT = b'"correct": true'  # inside a text its quotes would be escaped


def read(file: Path) -> dict[str, Answers]:
    """The answers of every slice in an `items.jsonl`; nothing of one that is torn or not there."""
    try:
        slices = _by_slice(file.read_bytes().splitlines())
    except (FileNotFoundError, ValueError, KeyError):
        return {}
    return {name: compact(each) for name, each in slices.items()}


def _by_slice(lines: Iterable[bytes]) -> dict[str, list[bytes]]:
    """Lines by slice; one line a slice is parsed, for a grid has hundreds of thousands."""
    slices: dict[str, list[bytes]] = {}
    names: dict[bytes, str] = {}
    for line in lines:
        head = line.partition(b', "id": ')[0]
        if head not in names:
            names[head] = str(json.loads(line)["slice"])
        slices.setdefault(names[head], []).append(line)
    return slices


def compact(lines: Iterable[bytes]) -> Answers:
    """The answers that stand in the lines of one slice, in order."""
    whole = hashlib.sha256()
    marks, bits, n = bytearray(), 0, 0
    for line in lines:
        n += 1
        whole.update(line + b"\n")
        marks += hashlib.sha256(line).digest()[:_BYTES]
        bits = bits << 1 | (_RIGHT in line)
    right = f"{bits:0{-(-n // 4)}x}"
    return Answers(n, whole.hexdigest()[:16], right, base64.b64encode(bytes(marks)).decode())


def differing(old: Answers, new: Answers) -> tuple[int, int]:
    """How many items differ in anything, and how many in being right.

    An item that only one of the two has differs in both.
    """
    both = min(old.n, new.n)
    alone = max(old.n, new.n) - both
    changed = sum(_mark(old, i) != _mark(new, i) for i in range(both))
    if not changed and not alone and old.digest != new.digest:
        changed = 1  # two lines with equal marks: one in 16 million
    flipped = sum(_is_right(old, i) != _is_right(new, i) for i in range(both))
    return changed + alone, flipped + alone


def _mark(answers: Answers, i: int) -> str:
    return answers.items[_CHARACTERS * i : _CHARACTERS * (i + 1)]


def _is_right(answers: Answers, i: int) -> bool:
    return bool(int(answers.right, 16) >> (answers.n - 1 - i) & 1)
