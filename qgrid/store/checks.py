"""What can be wrong with a record, an artifact, a quality result, a plan: one function each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qgrid import codec
from qgrid.files import sha256
from qgrid.store import glance
from qgrid.types import RECORD_SCHEMA, Manifest, PlannedCell, Record, Settings, StageResult
from qgrid.weights import artifacts, verification

Remedy = Literal["set aside", "remove", "put back", "leave"]

PLAN_AGAIN = "run the sweep's grid again with the same `name`, which writes it anew"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file or a folder, as the end of a sentence, and what mends it.

    `set aside`: moved away, so that it is made or measured again; `remove`: nobody needs it;
    `put back`: it was to be replaced, and was not; `leave`: only the user knows.
    """

    text: str
    remedy: Remedy


class Broken(ValueError):
    """A file whose content is not what its name says; the message ends a sentence about it."""


def record(file: Path) -> Fault | None:
    """A record: whole, of this schema, in the folder of its cell."""
    data = _json(file)
    schema = data.get("schema")
    if schema != RECORD_SCHEMA and str(schema).startswith(RECORD_SCHEMA.partition("/")[0] + "/"):
        return Fault(
            f"has schema `{schema}`, and this qgrid reads `{RECORD_SCHEMA}`; use the version that "
            "wrote it, or delete the file to measure the cell again",
            "leave",
        )
    try:
        found = codec.loads(Record, _text(file))
    except codec.UnknownKey as error:
        return Fault(
            f"was written by a newer qgrid ({error}); use that one, or delete the file to measure "
            "the cell again",
            "leave",
        )
    except codec.InvalidValue as error:
        raise Broken(f"`{file.name}` cannot be read: {error}") from None
    _same("cell_id", found.cell_id, file.parent.name)
    return None


def artifact(folder: Path, full: bool) -> Fault | None:
    """An artifact: its manifest, and every file of it by size (`full`: by every byte)."""
    file = folder / artifacts.MANIFEST
    if not file.is_file():
        raise Broken(f"has no `{artifacts.MANIFEST}`: it was not built to its end")
    manifest = _typed(Manifest, file)
    _same("artifact_id", manifest.artifact_id, folder.name)
    hashed = sha256 if full else _as_listed(folder, manifest)
    check = verification.check_files(folder, manifest, hashed)
    if not check.ok:
        raise Broken(f"is not as it was built: {check.actual}")
    return None


def quality(folder: Path) -> Fault | None:
    """A quality result with its results per item; a stage that has not ended is no fault."""
    file = folder / "result.json"
    if not file.exists():
        return None
    result = _typed(StageResult, file)
    items = folder / "items.jsonl"
    if items.exists():
        _whole_lines(items)
    elif any(measurement.slice is not None for measurement in result.measurements):
        raise Broken(f"has numbers of slices, and no `{items.name}`")
    return None


def stage_result(file: Path) -> Fault | None:
    """The result of a build or of a timing."""
    _typed(StageResult, file)
    return None


def plan(file: Path) -> Fault | None:
    """The cells of a sweep, a line each."""
    try:
        text = _text(file)
        if not text.endswith("\n"):
            raise Broken("ends in the middle of a line")
        for number, line in enumerate(glance.plan_lines(file), start=1):
            _typed_line(PlannedCell, line, number)
    except Broken as error:
        return Fault(f"{error}; {PLAN_AGAIN}", "leave")
    return None


def settings(file: Path) -> Fault | None:
    """How a sweep runs."""
    try:
        _typed(Settings, file)
    except Broken as error:
        return Fault(f"{error}; {PLAN_AGAIN}", "leave")
    return None


def launcher(file: Path) -> Fault | None:
    """What a sweep was launched with."""
    from qgrid import launchers

    try:
        _typed(launchers.Chosen, file)
    except Broken as error:
        return Fault(f"{error}; {PLAN_AGAIN}", "leave")
    return None


def hashes(file: Path) -> Fault | None:
    """The remembered hashes; without them files are read again."""
    for entry in _json(file).values():
        if not (isinstance(entry, list) and len(entry) == 2):
            raise Broken("holds an entry that is no time and hash")
        if not all(isinstance(part, str) for part in entry):
            raise Broken("holds an entry that is no text")
    return None


def _as_listed(folder: Path, manifest: Manifest) -> Callable[[Path], str]:
    """The hash of the manifest itself, where files are not read."""
    return lambda path: manifest.files.get(str(path.relative_to(folder)), "")


def _typed(kind: type[Any], file: Path) -> Any:
    try:
        return codec.loads(kind, _text(file))
    except codec.InvalidValue as error:
        raise Broken(f"`{file.name}` cannot be read: {error}") from None


def _typed_line(kind: type[Any], line: str, number: int) -> None:
    try:
        codec.loads(kind, line)
    except codec.InvalidValue as error:
        raise Broken(f"cannot be read in line {number}: {error}") from None


def _whole_lines(file: Path) -> None:
    """Every line a JSON object, the last one ended."""
    text = _text(file)
    if text and not text.endswith("\n"):
        raise Broken(f"`{file.name}` ends in the middle of a line")
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            whole = isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise Broken(f"line {number} of `{file.name}` is not a JSON object")


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise Broken(f"is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise Broken("is not a JSON object")
    return data


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Broken(f"`{file.name}` is not UTF-8 ({error.reason} at byte {error.start})") from None


def _same(key: str, found: str, expected: str) -> None:
    if found != expected:
        raise Broken(f"says `{key}={found}` in a folder named `{expected}`")
