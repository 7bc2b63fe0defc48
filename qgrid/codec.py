"""Frozen types to JSON and back, with errors that name the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

_SHOWN = 200  # characters of a wrong value
_STRICT = ConfigDict(extra="forbid", strict=True)


class InvalidValue(ValueError):
    """A value that does not fit its type; the message names the key, the value and the rule."""


class UnknownKey(InvalidValue):
    """Nothing is wrong but keys that are not known: a newer version may have written them."""


_UNKNOWN = frozenset({"unexpected_keyword_argument", "extra_forbidden"})


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    _forbid_unknown_keys(kind)
    return TypeAdapter(kind)


def _forbid_unknown_keys(kind: type) -> None:
    """Make every dataclass of qgrid strict: pydantic reads this attribute, also when nested."""
    from qgrid import types

    known = [obj for obj in vars(types).values() if dataclasses.is_dataclass(obj)]
    for each in {kind, *known}:
        if dataclasses.is_dataclass(each) and "__pydantic_config__" not in vars(each):
            setattr(each, "__pydantic_config__", _STRICT)  # noqa: B010


def plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as dicts and lists, ready for `json.dumps`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text of a frozen type. NaN and infinity are refused: a number is a number."""
    return json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def loads(kind: type[T], text: str | bytes, prefix: str = "") -> T:
    """Parse JSON into a frozen type.

    Raises:
        InvalidValue: one sentence a problem; `prefix` leads the key in it. `UnknownKey`: there is
            no other problem than keys that the type does not have.
    """
    try:
        parsed: T = _adapter(cast("Any", kind)).validate_json(text)
    except ValidationError as error:
        kinds = {detail["type"] for detail in error.errors(include_url=False)}
        wrong = UnknownKey if kinds <= _UNKNOWN else InvalidValue
        raise wrong("; ".join(_sentences(error, prefix))) from None
    return parsed


def read(kind: type[T], file: Path) -> T:
    """A frozen type from a JSON file.

    Raises:
        FileNotFoundError: there is none.
        InvalidValue: the message begins with the file.
    """
    try:
        return loads(kind, file.read_bytes())
    except InvalidValue as error:
        raise InvalidValue(f"{file}: {error}") from None


def convert(kind: type[T], value: Mapping[str, Any], prefix: str = "") -> T:
    """A plain mapping as a frozen type, checked strictly (`"4"` is not a number)."""
    return loads(kind, json.dumps(value), prefix)


def digest(value: Any, length: int = 16) -> str:
    """Stable identity of plain data: sha256 of its canonical JSON, `length` hex digits."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _sentences(error: ValidationError, prefix: str) -> list[str]:
    return [_sentence(dict(detail), prefix) for detail in error.errors(include_url=False)]


def _sentence(detail: dict[str, Any], prefix: str) -> str:
    key = ".".join([*([prefix] if prefix else []), *(str(part) for part in detail["loc"])])
    kind = detail["type"]
    if kind == "json_invalid":  # the input is the whole text
        return f"{f'`{key}` is ' if key else ''}not JSON ({detail['ctx']['error']})"
    if kind in _UNKNOWN:
        return f"`{key}` is not a known key; remove it or correct its spelling"
    if kind in {"missing", "missing_argument"}:
        return f"`{key}` is missing"
    allowed = str(detail["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    found = json.dumps(detail["input"], default=str)
    shown = found if len(found) <= _SHOWN else f"{found[:_SHOWN]}…"
    return f"`{key}={shown}` should be {allowed}"
