"""The keys of a configuration, and what to say of one that is none."""

from __future__ import annotations

import difflib
from dataclasses import fields

from qgrid import config
from qgrid.types import Choice, Settings

KEYS = {field.name for kind in (Choice, Settings) for field in fields(kind)}


def unknown_key(key: str) -> str:
    """That a key is none, with one that is alike, the choices that have it, or where it stands."""
    said = f"`{key}` is not a known key"
    group, dot, name = key.partition(".")
    if dot and group in config.defaults():
        return f"{said} of this choice of `{group}`{_nearest(group, name)}"
    parts = {top: value for top, value in config.scalars().items() if isinstance(value, dict)}
    known = [*KEYS, *(f"{top}.{part}" for top, value in parts.items() for part in value)]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f", did you mean `{near[0]}`?" if near else ";"
    return f"{said}{hint} `qgrid --help` lists the keys"


def _nearest(group: str, name: str) -> str:
    """The other choices that have such a key, else one that is alike."""
    known = config.options(group)
    if name in known:
        return f", but of {', '.join(known[name])}"
    if near := difflib.get_close_matches(name, known, n=1):
        return f", did you mean `{group}.{near[0]}`?"
    return f"; its keys stand in `conf/{group}/NAME.yaml`"
