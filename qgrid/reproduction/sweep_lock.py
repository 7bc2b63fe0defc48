"""`sweep.lock.yaml`: a sweep in one file, to commit and to run again (docs/reproduce.md)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qgrid import codec, redact
from qgrid.files import HashCache, write_atomic
from qgrid.reproduction import answers, inputs, parts, replan, yaml_text
from qgrid.reproduction.lock import (
    FILE,
    SCHEMA,
    SEEN,
    Answers,
    Composition,
    Lock,
    LockedArtifact,
    LockedCell,
    Row,
)
from qgrid.types import PlannedCell, Record, Settings

COMMAND = "command.json"  # in the sweep's folder: the words that the user gave

_HEAD = """\
# What this sweep measured, and all that it takes to measure it again:
#   python -m qgrid reproduce {name}
# Written by qgrid; docs/reproduce.md describes it.
"""
_ELSEWHERE = ("environment", "python", "versions", "cuda")  # of a stage in another environment


class UnreadableLock(ValueError):
    """A lock that this version cannot read; the message names the file and the reason."""


def write(folder: Path, planned: Sequence[PlannedCell], records: Iterable[Record]) -> Path:
    """Write the lock of a sweep into its folder; the same records give the same bytes.

    A cell without a record is locked without results.
    """
    path = folder / FILE
    text = yaml_text.dumps(codec.plain(build(folder, planned, records)))
    write_atomic(path, _HEAD.format(name=FILE) + text)
    return path


def read(path: Path) -> Lock:
    """The lock in a file.

    Raises:
        FileNotFoundError: there is none.
        UnreadableLock: it is not YAML, has another schema, or does not follow it.
    """
    try:
        data = yaml_text.load(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no lock `{path}`; give the path of a `{FILE}`, which every sweep writes"
        ) from None
    except yaml_text.InvalidYaml as error:
        raise UnreadableLock(f"{error}; `python -m qgrid resume` writes a sweep's anew") from None
    if data.get("schema") != SCHEMA:
        raise UnreadableLock(
            f"{path} has schema `{data.get('schema')}`; this qgrid reads `{SCHEMA}`: use the "
            "version that wrote it"
        )
    try:
        lock = codec.convert(Lock, data)
        for each in lock.cells.values():
            parts.put_together(lock.parts, each.cell)
    except codec.InvalidValue as error:
        raise UnreadableLock(f"{path} does not follow `{SCHEMA}`: {error}") from None
    except KeyError as error:
        raise UnreadableLock(
            f"{path} has a cell of {error}, which is not among its parts"
        ) from None
    return lock


def build(folder: Path, planned: Sequence[PlannedCell], records: Iterable[Record]) -> Lock:
    """The lock of a sweep, from its plan and its records."""
    store = folder.parents[1]
    cache = HashCache(store / "hashes.json")
    whole, compositions = parts.taken_apart(planned)
    hashes, _ = inputs.read(whole, cache)
    settings = codec.read(Settings, folder / "settings.json")
    known = {record.cell_id: record for record in records}
    seen = {cell_id: _environment(record) for cell_id, record in known.items()}
    root = store.parent
    return Lock(
        schema=SCHEMA,
        name=folder.name,
        command=_command(folder, root),
        commits=_commits(known.values()),
        verify=settings.verify,
        limits=settings.limits,
        changed=replan.changed(planned, cache),
        pins=inputs.pins(each.cell for each in planned),
        environments=dict(seen[cell_id] for cell_id in compositions if cell_id in seen),
        inputs=hashes,
        parts=parts.portable(whole, root),
        cells={each.cell_id: _cell(each, compositions, known, seen) for each in planned},
        qualities=_qualities(store, planned, known),
        artifacts=_artifacts(planned, known),
    )


def _cell(
    planned: PlannedCell,
    compositions: Mapping[str, Composition],
    known: Mapping[str, Record],
    seen: Mapping[str, tuple[str, Mapping[str, Any]]],
) -> LockedCell:
    record = known.get(planned.cell_id)
    return LockedCell(
        cell=compositions[planned.cell_id],
        artifact_id=planned.artifact_id,
        quality_id=planned.quality_id,
        baseline_cell_id=planned.baseline_cell_id,
        added=planned.added,
        status=None if record is None else record.status,
        environment=None if record is None else seen[planned.cell_id][0],
        measurements=() if record is None else rows(record),
    )


def rows(record: Record) -> tuple[Row, ...]:
    """The measurements of a record as a lock keeps them."""
    return tuple(
        Row(each.metric, each.slice, each.value, each.low, each.high, each.n)
        for each in record.measurements
    )


def _environment(record: Record) -> tuple[str, Mapping[str, Any]]:
    """A name for the environment of a record, and what of it a repetition would need."""
    found = {key: record.environment[key] for key in SEEN if key in record.environment}
    stages = record.environment.get("stages", {})
    elsewhere = {
        seen["lock"]: {key: seen.get(key) for key in _ELSEWHERE}
        for seen in stages.values()
        if "lock" in seen
    }
    name = str(record.environment.get("fingerprint", codec.digest(found)))
    if not elsewhere:
        return name, found
    return codec.digest([name, elsewhere]), {**found, "elsewhere": elsewhere}


def _commits(records: Iterable[Record]) -> tuple[str, ...]:
    found = (record.environment.get("git_commit") for record in records)
    return tuple(dict.fromkeys(str(commit) for commit in found if commit is not None))


def _qualities(
    store: Path, planned: Iterable[PlannedCell], known: Mapping[str, Record]
) -> dict[str, dict[str, Answers]]:
    wanted = dict.fromkeys(each.quality_id for each in planned if each.cell_id in known)
    found = {each: answers.read(store / "quality" / each / "items.jsonl") for each in wanted}
    return {quality_id: slices for quality_id, slices in found.items() if slices}


def _artifacts(
    planned: Iterable[PlannedCell], known: Mapping[str, Record]
) -> dict[str, LockedArtifact]:
    found = {}
    for each in planned:
        record = known.get(each.cell_id)
        if record is not None and record.artifact:
            found[each.artifact_id] = _artifact(record.artifact)
    return found


def _artifact(summary: Mapping[str, Any]) -> LockedArtifact:
    drawn = summary.get("calibration")
    return LockedArtifact(
        format=summary.get("format"),
        files=summary.get("files", {}),
        tokenizer=summary.get("tokenizer", {}),
        calibration=None if drawn is None else drawn.get("sha256"),
        versions=summary.get("versions", {}),
    )


def keep_command(folder: Path, words: Sequence[str]) -> None:
    """Keep the words of the command that planned a sweep, without secrets."""
    write_atomic(folder / COMMAND, json.dumps(redact.plain(list(words)), ensure_ascii=False) + "\n")


def _command(folder: Path, root: Path) -> tuple[str, ...] | None:
    try:
        words = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return tuple(str(word).replace(f"={root}/", "=./") for word in words)


def planned(lock: Lock) -> list[PlannedCell]:
    """The cells of a lock as they were planned."""
    return [
        PlannedCell(
            cell_id=cell_id,
            artifact_id=each.artifact_id,
            quality_id=each.quality_id,
            baseline_cell_id=each.baseline_cell_id,
            cell=parts.put_together(lock.parts, each.cell),
            added=each.added,
        )
        for cell_id, each in lock.cells.items()
    ]
