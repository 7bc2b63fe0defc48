"""Surprises of a load: requests that failed, and what made its figures better than they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qgrid.report import rows
from qgrid.report.rows import Row


def sentences(row: Row) -> Iterator[str]:
    """What a reader of a cell's throughput should know first."""
    yield from _failed(row)
    yield from _given_up(row)
    yield from _client(row)
    yield from _counted(row)
    yield from _unanswered(row)


def _failed(row: Row) -> Iterator[str]:
    """Failed requests are in no other figure, so a load looks as good without them."""
    counts = {
        part: found
        for part in rows.loads([row], "failed_requests")
        if (found := row.get("failed_requests", part)) is not None
    }
    failed = {part: found for part, found in counts.items() if found.value > 0}
    if not failed:
        return
    total = sum(found.value for found in failed.values())
    known = [found.n for found in counts.values() if found.n is not None]
    of = f" of {sum(known)}" if len(known) == len(counts) else ""
    where = ", ".join(f"{found.value:.0f} at {rows.load_name(p)}" for p, found in failed.items())
    first = _first_error(row)
    told = f"; the first: {first}" if first is not None else ""
    yield f"{total:.0f}{of} requests failed ({where}){told}."


def _first_error(row: Row) -> str | None:
    """The first sentence of the smallest load that had a failure."""
    told = _mapping(row.observed("failures"))
    for part in sorted(told, key=lambda part: (rows.load(part) is None, rows.load(part))):
        for kind in _mapping(told[part]).values():
            if (first := _mapping(kind).get("first")) is not None:
                return str(first).rstrip(".")
    return None


def _given_up(row: Row) -> Iterator[str]:
    """Loads that were not tried to the end."""
    if names := _listed(row.observed("given_up")):
        yield f"{names} was given up, for all of its requests failed, twice in a row."


def _client(row: Row) -> Iterator[str]:
    if names := _listed(row.observed("client_is_the_limit")):
        yield f"at {names} the load generator itself was the limit; the server may do more."


def _counted(row: Row) -> Iterator[str]:
    """Requests that were not what was asked for."""
    stories = {
        "cached_prompt_tokens": "prompt tokens came from the server's cache, so that the time to "
        "first token is better than that of new prompts",
        "wrong_length": "requests gave another number of tokens than was asked for",
        "other_prompt_length": "prompts had another length than was asked for, by the server's "
        "count",
        "several_tokens_a_chunk": "answers came several tokens at a time, so that ITL is the time "
        "between chunks",
        "sent_late": "requests were sent late by the load generator; their latency counts from "
        "when they were due",
    }
    for key, story in stories.items():
        count = row.observed(key)
        if isinstance(count, int) and count > 0:
            yield f"{count:,} {story}."


def _unanswered(row: Row) -> Iterator[str]:
    """Items of a slice and windows of prose that a server gave no answer to."""
    for (metric, part), found in row.measured.items():
        if metric == "failed_items" and found.value > 0:
            of = "" if found.n is None else f" of {found.n}"
            yield f"{found.value:.0f}{of} items of `{part}` got no answer, and count for nothing."
    if windows := _mapping(row.observed("failed_windows")):
        of = row.observed("windows")
        yield f"{len(windows)} of {of} windows of prose got no answer, and count for nothing."


def _listed(parts: Any) -> str:
    names = [str(part) for part in parts] if isinstance(parts, (list, tuple)) else []
    return ", ".join(rows.load_name(name) for name in names)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
