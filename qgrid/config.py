"""Composition: overrides in, plain configurations out. No other module composes with Hydra."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


@dataclass(frozen=True)
class Composed:
    """A configuration as written, and with its interpolations resolved."""

    raw: dict[str, Any]
    values: dict[str, Any]


Compose = Callable[[Sequence[str]], Composed]

_INTERPOLATION = re.compile(r"\$\{([^}]*)\}")
_SAFE_RESOLVERS = ("oc.env:", "oc.decode:")


class GridError(ValueError):
    """A grid that cannot be composed; the message is one sentence for the user."""


def root(kind: str) -> Path:
    """The folder `conf` or `sweeps`: the checkout's, or the copy inside an installed package."""
    package = Path(__file__).resolve().parent
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


# --- one choice of a group, for what composes no grid --------------------------------------------


def defaults() -> dict[str, str]:
    """Group -> the choice that `conf/config.yaml` makes."""
    listed = _read(root("conf") / "config.yaml")["defaults"]
    pairs = (pair for each in listed if isinstance(each, dict) for pair in each.items())
    return {group: name for group, name in pairs if not group.startswith("override ")}


def scalars() -> dict[str, Any]:
    """The keys of `conf/config.yaml` that are no group."""
    own = _read(root("conf") / "config.yaml")
    return {key: value for key, value in own.items() if key not in {"defaults", "hydra"}}


def choice(group: str, name: str) -> dict[str, Any]:
    """A group's file as it is, looked for in `--config-dir` first.

    Raises:
        FileNotFoundError: there is none.
    """
    files = [folder / f"{name}.yaml" for folder in _folders(group)]
    return _read(next((file for file in files if file.is_file()), files[-1]))


def options(group: str) -> dict[str, list[str]]:
    """The keys of a group's files, and the choices that have each; no word of broken files."""
    from yaml import YAMLError

    found: dict[str, list[str]] = {}
    names = {file.stem for folder in _folders(group) for file in folder.glob("*.yaml")}
    for name in sorted(names):
        with contextlib.suppress(OSError, ValueError, YAMLError):
            content: Any = choice(group, name)
            for key in content if isinstance(content, dict) else ():
                found.setdefault(str(key), []).append(name)
    return found


def _folders(group: str) -> list[Path]:
    """Where the files of a group lie; the first that has a name counts."""
    own = [Path(each) for each in os.environ.get("QGRID_CONFIG_DIR", "").split(os.pathsep) if each]
    return [place / group for place in (*own, root("conf"))]


def _read(file: Path) -> dict[str, Any]:
    import yaml

    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


# --- from overrides to configurations ------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A swept override: `method=awq,gptq` has two values."""

    key: str  # the top-level key it writes under
    overrides: tuple[str, ...]
    values: tuple[Any, ...]  # parsed; meaningful for plain scalars only
    is_plain: bool  # `bits=4,8`: no group, no path, no `+`


@dataclass(frozen=True)
class Grid:
    """All configurations of a sweep as a product: the fixed part and one table a swept key."""

    fixed: dict[str, Any]
    axes: tuple[Axis, ...]
    tables: Mapping[str, Mapping[tuple[int, ...], Any]]  # key -> choice on its axes -> node
    whole: tuple[dict[str, Any], ...] | None = None  # composed one by one where keys are entangled

    def __len__(self) -> int:
        sizes = (len(axis.overrides) for axis in self.axes)
        return len(self.whole) if self.whole is not None else _product(sizes)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.whole is not None:
            yield from self.whole
            return
        where = {key: _positions(self.axes, key) for key in self.tables}
        for index in itertools.product(*(range(len(axis.overrides)) for axis in self.axes)):
            swept = {
                key: table[tuple(index[i] for i in where[key])]
                for key, table in self.tables.items()
            }
            yield self.fixed | swept

    def overrides(self) -> Iterator[tuple[str, ...]]:
        """The swept overrides of every configuration, in the order of iteration."""
        return itertools.product(*(axis.overrides for axis in self.axes))


def expand(compose: Compose, overrides: Sequence[Override]) -> Grid:
    """The product of all swept overrides.

    Every choice is composed once and the choices are combined, which is exact because a group
    file writes only under its own key. Where that does not hold (a file writes elsewhere, or an
    interpolation reaches into another swept key) every cell is composed on its own, with a warning.
    """
    fixed = [str(item.input_line) for item in overrides if not _is_swept(item)]
    axes = tuple(_axis(item) for item in overrides if _is_swept(item))
    base = compose([*fixed, *(axis.overrides[0] for axis in axes)])
    for item in overrides:
        _refuse_idle(item, overrides, base.values)
    try:
        tables = {
            key: _table(compose, fixed, base, key, axes)
            for key in dict.fromkeys(axis.key for axis in axes)
        }
    except _Entangled as trouble:
        warnings.warn(f"composing cell by cell, which is slow: {trouble}", stacklevel=2)
        every = itertools.product(*(axis.overrides for axis in axes))
        return Grid(base.values, axes, {}, tuple(compose([*fixed, *one]).values for one in every))
    return Grid(base.values, axes, tables)


def _refuse_idle(item: Override, others: Sequence[Override], values: Mapping[str, Any]) -> None:
    """Hydra merges mappings: an empty one, on its own, takes nothing away."""
    key = item.key_or_group
    if item.is_delete() or _is_swept(item) or item.value() != {}:
        return
    node: Any = values
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if node and not any(other.key_or_group.startswith(f"{key}.") for other in others):
        said = f"`{item.input_line}` would change nothing: a mapping is merged into what is there"
        hint = f"; leave parts of it out by name, as `~{key}.{next(iter(node))}`"
        raise GridError(f"{said}{hint if '.' in key else ''}")


class _Entangled(Exception):
    """Two keys of a configuration cannot be swapped one without the other."""


def _table(
    compose: Compose, fixed: Sequence[str], base: Composed, key: str, axes: Sequence[Axis]
) -> dict[tuple[int, ...], Any]:
    """The node of `key` for every choice on its own axes."""
    swept = {axis.key for axis in axes}
    own = [axis for axis in axes if axis.key == key]
    _check_separate(base, base, key, swept)
    if len(own) == 1 and own[0].is_plain and not isinstance(base.values.get(key, {}), dict):
        return {(i,): value for i, value in enumerate(own[0].values)}
    first = [axis.overrides[0] for axis in axes if axis.key != key]
    table: dict[tuple[int, ...], Any] = {}
    for index in itertools.product(*(range(len(axis.overrides)) for axis in own)):
        chosen = [axis.overrides[i] for axis, i in zip(own, index, strict=True)]
        composed = compose([*fixed, *chosen, *first])
        _check_separate(composed, base, key, swept)
        table[index] = composed.values.get(key)
    return table


def _check_separate(composed: Composed, base: Composed, key: str, swept: set[str]) -> None:
    """Raise where `key` wrote elsewhere or an interpolation crosses into another swept key."""
    for place, node in composed.raw.items():
        if place != key and node != base.raw.get(place):
            raise _Entangled(f"a choice of `{key}` writes under `{place}`")
        for target in _INTERPOLATION.findall(json.dumps(node, default=str)):
            to = target.split(".")[0]
            unknown = ":" in target and not target.startswith(_SAFE_RESOLVERS)
            if unknown or (to in swept and to != place):
                raise _Entangled(f"`{place}` holds ${{{target}}}")


def _axis(item: Override) -> Axis:
    name = item.get_key_element()
    lines = tuple(f"{name}={value}" for value in item.sweep_string_iterator())
    plain = name == item.key_or_group and not {"/", ".", "@"} & set(name)
    values = tuple(_parsed(line) for line in lines) if plain else ()
    return Axis(re.split(r"[./@]", item.key_or_group)[0], lines, values, plain)


def _parsed(line: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(line).value()


def _is_swept(item: Override) -> bool:
    if item.is_sweep_override() and not item.is_discrete_sweep():
        raise GridError(
            f"`{item.input_line}`: a grid needs listed values, such as a,b or range(1,4)"
        )
    return bool(item.is_sweep_override())


def _positions(axes: Sequence[Axis], key: str) -> tuple[int, ...]:
    return tuple(i for i, axis in enumerate(axes) if axis.key == key)


def _product(numbers: Iterator[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


# --- Hydra's side --------------------------------------------------------------------------------

_LIST_OF_STATUSES = re.compile(r"^(rerun=)([a-z_]+(?:,[a-z_]+)+)$")  # a list, never an axis


def parse(
    arguments: Sequence[str], params: Mapping[str, Any] | None, loader: Any = None
) -> list[Override]:
    """Override lines, after the axes of a committed grid, which they replace key by key.

    `loader` is Hydra's; `method=glob(*)` asks it for the choices of a group.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    axes = (params or {}).items()
    committed = [f"{key}={'null' if value is None else value}" for key, value in axes]
    latest: dict[str, Override] = {}
    lines = [_LIST_OF_STATUSES.sub(r"\1[\2]", line) for line in [*committed, *arguments]]
    for item in OverridesParser.create(loader).parse_overrides(lines):
        latest[item.get_key_element()] = item
    return list(latest.values())


def composer(loader: Any, master: Any) -> Compose:
    """Hydra's own composition of one configuration under the command line's `hydra.*` overrides."""
    from hydra.types import RunMode

    if not isinstance(loader.repository, _ReadOnce):
        loader.repository = _ReadOnce(loader.repository, {})
    own = list(master.hydra.overrides.hydra)
    name = master.hydra.job.config_name
    return lambda lines: composed(loader.load_configuration(name, [*own, *lines], RunMode.RUN))


class _ReadOnce:
    """Hydra's config repository, each file parsed once for all cells: parsing is most of the time.

    Composition changes what it is given, so every caller gets a copy.
    """

    def __init__(self, repository: Any, known: dict[str, Any]) -> None:
        self._repository = repository
        self._known = known  # config path -> what was read

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadOnce:
        """Hydra works on a copy for every cell: what was read is common to all."""
        return _ReadOnce(copy.deepcopy(self._repository, memo), self._known)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repository, name)

    def load_config(self, config_path: str) -> Any:
        if config_path not in self._known:
            self._known[config_path] = self._repository.load_config(config_path)
        return copy.deepcopy(self._known[config_path])


def composed(config: Any) -> Composed:
    """A DictConfig as plain data, without Hydra's own node."""
    from omegaconf import OmegaConf, open_dict

    with open_dict(config):
        config.pop("hydra", None)
    raw: Any = OmegaConf.to_container(config, resolve=False)
    values: Any = OmegaConf.to_container(config, resolve=True)
    return Composed(raw, values)
