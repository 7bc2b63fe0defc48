"""Which parts of a cell vary in a sweep, and a short label for every choice of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qgrid import codec
from qgrid.lora import adapters
from qgrid.types import Cell

ALWAYS = ("method", "bits")
OTHERS = (
    "model",
    "runtime",
    "gpu",
    "kv_cache",
    "calibration",
    "slices",
    "workload",
    "context",
    "seed",
)
ABSENT = "-"  # a method that needs no calibration


def labels(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """For each cell, axis -> label; `method` and `bits` first, then only axes that vary.

    A label is the choice's name; choices of one name that differ carry the values that tell them
    apart (`gptq group_size=32`), but for what most of them have.
    """
    columns = {
        axis: _labels([getattr(cell, axis) for cell in cells]) for axis in (*ALWAYS, *OTHERS)
    }
    shown = [*ALWAYS, *(axis for axis in OTHERS if _varies(columns[axis]))]
    return [{axis: columns[axis][i] for axis in shown} for i in range(len(cells))]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as one level: `{"options": {"a": 1}}` is `{"options.a": 1}`.

    Lists become JSON text, and so do mappings of patterns (`{"layers.0.*": 8}`).
    """
    if isinstance(value, Mapping) and not any({".", "*"} & set(str(key)) for key in value):
        pairs: dict[str, Any] = {}
        for key, item in value.items():
            pairs |= flat(item, f"{prefix}.{key}" if prefix else str(key))
        return pairs
    return {prefix: json.dumps(value) if isinstance(value, (Mapping, list, tuple)) else value}


def _varies(column: Iterable[str]) -> bool:
    return len(set(column) - {ABSENT}) > 1


def _labels(values: Sequence[Any]) -> list[str]:
    nodes = [flat(codec.plain(value)) for value in values]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for node in nodes:
        same = by_name.setdefault(_name(node), [])
        if node not in same:
            same.append(node)
    telling = {name: _telling(same) for name, same in by_name.items()}
    return [_label(node, telling[_name(node)]) for node in nodes]


def _name(node: Mapping[str, Any]) -> str:
    """The name of a group's choice, or the value of a scalar (whose only key is empty)."""
    value = node.get("name", node.get(""))
    if value == "hf":  # the choice that stands for any checkpoint
        value = node.get("id")
    if node.get("adapter") is not None:
        value = f"{value}+{adapters.short(node['adapter'])}"
    return ABSENT if value is None else str(value)


def _telling(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Keys in which choices differ -> the value that goes without saying.

    It is what more than half of them have, else a switch that is off. Patterns never do.
    """
    keys = dict.fromkeys(key for node in nodes for key in node)
    found: dict[str, Any] = {}
    for key in keys:
        values = [node.get(key) for node in nodes]
        known = Counter(map(repr, values))
        ((usual, count),) = known.most_common(1)
        if any(isinstance(value, str) and value.startswith("{") for value in values):
            found[key] = None  # patterns, such as of `keep`, are always said
        elif len(known) > 1:
            often = 2 * count > len(values)
            found[key] = next(v for v in values if repr(v) == usual) if often else False
    return found


def _label(node: Mapping[str, Any], telling: Mapping[str, Any]) -> str:
    """The name, and what tells it apart, written as in YAML; a switch that is on by its name."""
    parts = []
    for key, usual in telling.items():
        short, value = key.rpartition(".")[2], node.get(key)
        if repr(value) != repr(usual):
            told = json.dumps(value) if value is None or value is False else value
            parts.append(short if value is True else f"{short}={told}")
    return " ".join([_name(node), *parts])
