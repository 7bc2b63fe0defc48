"""From plain configurations to frozen types: every key, value and name is checked here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args

from qgrid import codec, redact, registry
from qgrid.config import GridError
from qgrid.planning.keys import KEYS, unknown_key
from qgrid.types import (
    Calibration,
    Choice,
    Gpu,
    KvCache,
    Method,
    Model,
    Runtime,
    Settings,
    Slices,
    Status,
    Workload,
)

T = TypeVar("T")

_SETTINGS = tuple(f.name for f in fields(Settings))
_REPEATABLE = (*get_args(Status), "stale", "unstable")
_SWEEP_NAME = re.compile(r"\w[\w.-]{0,99}")


class Reader:
    """Turns configurations into choices; each distinct node is checked once."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, Any]] = {}

    def choice(self, config: Mapping[str, Any]) -> Choice:
        """One configuration as a `Choice`.

        Raises:
            codec.InvalidValue: a key, its value and what is allowed.
            registry.UnknownName: a method or runtime that is not there.
        """
        if config.keys() != KEYS:
            raise GridError(_wrong_keys(config.keys()))
        return Choice(
            model=self._once(config["model"], Model, "model"),
            method=self._once(config["method"], Method, "method"),
            bits=_bits(config["bits"]),
            runtime=self._once(config["runtime"], Runtime, "runtime"),
            gpu=self._once(config["gpu"], Gpu, "gpu"),
            kv_cache=self._once(config["kv_cache"], KvCache, "kv_cache"),
            calibration=self._once(config["calibration"], Calibration, "calibration"),
            slices=self._once(config["slices"], Slices, "slices"),
            workload=self._once(config["workload"], Workload, "workload"),
            context=_whole_number("context", config["context"], least=1),
            seed=_whole_number("seed", config["seed"], least=0),
        )

    def _once(self, node: Mapping[str, Any], kind: type[T], key: str) -> T:
        if id(node) not in self._seen:
            if not isinstance(node, Mapping):
                raise codec.InvalidValue(f"`{key}={node}` should be a choice of the group `{key}`")
            _refuse_missing(node, key)
            _refuse_secrets(node, key)
            self._seen[id(node)] = (node, _READERS.get(kind, codec.convert)(kind, node, key))
        return self._seen[id(node)][1]  # type: ignore[no-any-return]


def settings(config: Mapping[str, Any]) -> Settings:
    """The keys that say how a sweep runs.

    Raises:
        GridError, codec.InvalidValue: a key, its value and what is allowed.
    """
    if config.keys() != KEYS:
        raise GridError(_wrong_keys(config.keys()))
    node = {key: config[key] for key in _SETTINGS}
    _refuse_secrets(node)
    if isinstance(node["rerun"], str):
        node["rerun"] = [node["rerun"]]
    made = codec.convert(Settings, node)
    for status in made.rerun:
        if status not in _REPEATABLE:
            raise GridError(f"`rerun={status}` is unknown (has: {', '.join(_REPEATABLE)})")
    if made.name is not None and not _SWEEP_NAME.fullmatch(made.name):
        raise GridError(
            f"`name={made.name!r}` should be letters, digits, `.`, `_` and `-`, at most 100, the "
            "first a letter or a digit: it names a folder"
        )
    return made


def _wrong_keys(found: Collection[str]) -> str:
    """What is wrong with the top level of a configuration."""
    if unknown := sorted(set(found) - KEYS):
        return unknown_key(unknown[0])
    return f"`{min(KEYS - set(found))}` is missing; every key must have a value"


def _method(_: type, node: Mapping[str, Any], key: str) -> Method:
    name = _name(node, key)
    options = {name: value for name, value in node.items() if name != "name"}
    return Method(name, codec.plain(codec.convert(registry.method(name).Options, options, key)))


def _runtime(_: type, node: Mapping[str, Any], key: str) -> Runtime:
    name = _name(node, key)
    own = {f.name for f in fields(Runtime)}
    options = {name: value for name, value in node.items() if name not in own}
    checked = codec.plain(codec.convert(registry.runtime(name).Options, options, key))
    known = {name: value for name, value in node.items() if name in own}
    return codec.convert(Runtime, {**known, "options": checked}, key)


_READERS: dict[type, Any] = {Method: _method, Runtime: _runtime}


def _refuse_missing(node: Mapping[str, Any], key: str) -> None:
    """Hydra's mark for a value that the user must give is `???`."""
    for name, value in node.items():
        if value == "???":
            raise codec.InvalidValue(f"`{key}.{name}` has no value; give one: `{key}.{name}=...`")


def _refuse_secrets(node: Mapping[str, Any], key: str | None = None) -> None:
    """A configuration is written to plan and records, so that a secret must not be in it."""
    for name, value in node.items():
        if redact.plain({name: value}) != codec.plain({name: value}):  # keys as text in both
            raise codec.InvalidValue(
                f"`{name if key is None else f'{key}.{name}'}` holds a secret, and is written to "
                "plan and records; give it by an environment variable instead, such as HF_TOKEN or "
                "the one that `runtime.api_key_env` names"
            )


def _name(node: Mapping[str, Any], key: str) -> str:
    name = node.get("name")
    if not isinstance(name, str):
        raise codec.InvalidValue(f"`{key}.name={name}` should be the name of a {key}")
    return name


def _bits(value: Any) -> int | None:
    return None if value is None else _whole_number("bits", value, least=1)


def _whole_number(key: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise codec.InvalidValue(f"`{key}={value}` should be a whole number, {least} or more")
    return value
