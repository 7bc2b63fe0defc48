"""Plain data to YAML that reads well in a diff, and back; every scalar as JSON writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WIDTH = 100  # characters of a line with a whole list or mapping on it

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_BARE = re.compile(r"[a-z][a-z_]*")
_RESERVED = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # words of YAML 1.1
_UNPRINTABLE = re.compile(r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


class InvalidYaml(ValueError):
    """A file that is no YAML mapping; the message names it and the place."""


def dumps(value: Mapping[str, Any]) -> str:
    """YAML text of a plain mapping, in its order; the same data gives the same bytes."""
    return "".join(f"{line}\n" for line in _block(value, ""))


def load(file: Path) -> Mapping[str, Any]:
    """The mapping in a file.

    Raises:
        OSError: the file cannot be read.
        InvalidYaml: it is no YAML, or no mapping.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 - both are safe
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidYaml(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InvalidYaml(f"{file} should hold a mapping, holds {type(data).__name__}")
    if _is_shared(data):
        raise InvalidYaml(f"{file} uses anchors, which qgrid does not write")
    return data


def _is_shared(data: Any) -> bool:
    """Whether a container stands in several places: a few lines could unfold to any size."""
    seen: set[int] = set()
    ahead = [data]
    while ahead:
        each = ahead.pop()
        if id(each) in seen:
            return True
        seen.add(id(each))
        inside = each.values() if isinstance(each, dict) else each
        ahead += [item for item in inside if isinstance(item, (dict, list))]
    return False


def _block(value: Any, indent: str) -> Iterator[str]:
    """The lines of a mapping or a list that is not empty."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _entry(f"{indent}{_key(str(key))}:", each, f"{indent}  ")
    else:
        for each in value:  # a row of a table stays one line
            yield from _entry(f"{indent}-", each, f"{indent}  ", width=None)


def _entry(head: str, value: Any, indent: str, width: int | None = WIDTH) -> Iterator[str]:
    flow = _flow(value)
    fits = width is None or not value or not _is_container(value)
    if flow is not None and (fits or len(head) + len(flow) < WIDTH):
        yield f"{head} {flow}"
    else:
        yield head
        yield from _block(value, indent)


def _flow(value: Any) -> str | None:
    """A scalar, an empty container or one of scalars on one line; None for what is nested."""
    if isinstance(value, Mapping):
        if any(_is_container(each) for each in value.values()):
            return None
        inside = ", ".join(f"{_key(str(key))}: {_scalar(each)}" for key, each in value.items())
        return f"{{{inside}}}"
    if isinstance(value, (list, tuple)):
        if any(_is_container(each) for each in value):
            return None
        return f"[{', '.join(map(_scalar, value))}]"
    return _scalar(value)


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) and key not in _RESERVED else _scalar(key)


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    text = _ENCODER.encode(value)
    if isinstance(value, str):
        return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text


def _number(value: float) -> str:
    """The shortest text that gives the same float; YAML 1.1 wants a point before an exponent."""
    text = _ENCODER.encode(value)
    mantissa, exponent, power = text.partition("e")
    return text if not exponent or "." in mantissa else f"{mantissa}.0e{power}"
