"""Items of slices: reading, choosing, identity; no model library (format: docs/slices.md)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import models

if TYPE_CHECKING:
    from qgrid.files import HashCache
    from qgrid.types import Slice, Slices

_KEYS = {"id", "level", "prompt", "choices", "answer", "document", "schema"}


class InvalidSlice(ValueError):
    """A slice file that does not follow the format; the message names file, line and key."""


@dataclass(frozen=True)
class Item:
    """One question. `message` is the user's whole message, the document's text included."""

    id: str
    level: int
    message: str
    answer: str
    choices: tuple[str, ...]
    document: str | None
    schema: Mapping[str, Any] | None


def identity(slices: Slices, cache: HashCache) -> dict[str, str]:
    """Content hash of every file, by slice name; prose under `prose`."""
    paths = {f"items.{name}": each.path for name, each in slices.items.items()}
    if slices.prose:
        paths["prose"] = slices.prose.path
    return {name: cache.sha256(models.resource(path)) for name, path in sorted(paths.items())}


def read(path: Path) -> list[Item]:
    """All items of a JSONL file, in its order.

    Raises:
        InvalidSlice: a line that is no JSON object, a missing or unknown key, a repeated id.
    """
    documents: dict[str, str] = {}
    items: dict[str, Item] = {}
    # Not `splitlines`: a text inside JSON may hold other characters that end a line, as U+2028.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        content = _parsed(line, place)
        if "text" in content:
            _require_texts(content, ("document", "text"), place)
            documents[content["document"]] = content["text"]
            continue
        item = _item(content, documents, place)
        if item.id in items:
            raise InvalidSlice(f"{place}: id `{item.id}` is used twice; give every item its own")
        items[item.id] = item
    if not items:
        raise InvalidSlice(f"{path.name} holds no items")
    return list(items.values())


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidSlice(f"{place}: not JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise InvalidSlice(f"{place}: should be a JSON object, is {type(content).__name__}")
    return content


def _item(content: Mapping[str, Any], documents: Mapping[str, str], place: str) -> Item:
    unknown = sorted(set(content) - _KEYS)
    if unknown:
        known = ", ".join(sorted(_KEYS))
        raise InvalidSlice(f"{place}: `{unknown[0]}` is not a key of an item (has: {known})")
    _require_texts(content, ("id", "prompt", "answer"), place)
    document = content.get("document")
    if document is not None and (not isinstance(document, str) or document not in documents):
        raise InvalidSlice(f"{place}: document `{document}` has no line with its text before it")
    level = content.get("level", 0)
    if isinstance(level, bool) or not isinstance(level, int):
        raise InvalidSlice(f"{place}: `level` should be a whole number, is {level!r}")
    schema = content.get("schema")
    if schema is not None and not isinstance(schema, dict):
        raise InvalidSlice(f"{place}: `schema` should be a JSON object, is {schema!r}")
    prompt = content["prompt"]
    return Item(
        id=content["id"],
        level=level,
        message=prompt if document is None else f"{documents[document]}\n\n{prompt}",
        answer=content["answer"],
        choices=_choices(content, place),
        document=document,
        schema=schema,
    )


def _require_texts(content: Mapping[str, Any], keys: Sequence[str], place: str) -> None:
    for key in keys:
        value = content.get(key)
        if not isinstance(value, str):
            raise InvalidSlice(f"{place}: `{key}` should be text, is {value!r}")
        if not value:
            raise InvalidSlice(f"{place}: `{key}` is empty")


def _choices(content: Mapping[str, Any], place: str) -> tuple[str, ...]:
    choices = content.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(each, str) for each in choices):
        raise InvalidSlice(f"{place}: `choices` should be a list of texts, is {choices!r}")
    if not all(choices):
        raise InvalidSlice(f"{place}: a choice is empty")
    if choices and content["answer"] not in choices:
        raise InvalidSlice(f"{place}: the answer {content['answer']!r} is not among the choices")
    if len(set(choices)) < len(choices):
        raise InvalidSlice(f"{place}: a choice appears twice")
    return tuple(choices)


def load(name: str, wanted: Slice, seed: int) -> list[Item]:
    """The items of a slice that a run evaluates, in the order of evaluation.

    Raises:
        InvalidSlice: see `read`; or items that do not suit the scoring.
    """
    items = read(models.resource(wanted.path))
    if wanted.scoring == "choice":
        bare = next((item for item in items if len(item.choices) < 2), None)
        if bare:
            raise InvalidSlice(
                f"slice `{name}` has `scoring=choice`, but item `{bare.id}` has fewer than two "
                "choices; add `choices` to it or use `scoring=exact`"
            )
    if wanted.scoring == "json":
        for item in items:
            _require_json(name, item)
    return choose(items, wanted.limit, seed)


def _require_json(name: str, item: Item) -> None:
    """Refuse an answer that is no JSON, and a schema that is none, before anything is generated."""
    import jsonschema

    try:
        json.loads(item.answer)
        if item.schema is not None:
            jsonschema.validators.validator_for(item.schema).check_schema(item.schema)
    except json.JSONDecodeError as error:
        raise InvalidSlice(
            f"slice `{name}` has `scoring=json`, but the answer of item `{item.id}` is not JSON: "
            f"{error.msg}"
        ) from None
    except jsonschema.SchemaError as error:
        raise InvalidSlice(
            f"slice `{name}`: the schema of item `{item.id}` is not a JSON Schema: {error.message}"
        ) from None


def choose(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """At most `limit` items, spread evenly over levels; items of one document stay together.

    The seed alone decides which and in what order, so every cell of a grid sees the same.
    """
    turns = _by_turns(_shuffled_levels(_units(items), seed))
    chosen = [item for unit in turns for item in unit]
    return chosen if limit is None else chosen[:limit]


def _units(items: Sequence[Item]) -> list[list[Item]]:
    """Documents with their items; an item without a document is a unit by itself."""
    units: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        key = ("item", item.id) if item.document is None else ("document", item.document)
        units.setdefault(key, []).append(item)
    return list(units.values())


def _shuffled_levels(units: Sequence[list[Item]], seed: int) -> list[list[list[Item]]]:
    levels: dict[int, list[list[Item]]] = {}
    for unit in units:
        levels.setdefault(unit[0].level, []).append(unit)
    for level, members in levels.items():
        random.Random(f"{seed}:{level}").shuffle(members)
    return [levels[level] for level in sorted(levels)]


def _by_turns(levels: Sequence[Sequence[list[Item]]]) -> Iterator[list[Item]]:
    """One unit of each level in turn until all are used."""
    for turn in range(max(len(level) for level in levels)):
        for level in levels:
            if turn < len(level):
                yield level[turn]
