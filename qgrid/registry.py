"""Methods and runtimes by name: a file name is the registry key; entry points add a user's own."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from pathlib import Path

    from qgrid.contracts import MethodModule, RuntimeModule
    from qgrid.types import Method, MethodSupport

Kind = Literal["methods", "runtimes"]


class UnknownName(ValueError):
    """A name that no file and no entry point provides."""


class BrokenModule(ValueError):
    """A method or runtime whose module cannot be imported; the message says why."""


@cache
def names(kind: Kind) -> dict[str, str]:
    """Name -> importable module, qgrid's own first; files with a leading underscore are private."""
    package = importlib.import_module(f"qgrid.{kind}")
    own = {
        module.name: f"qgrid.{kind}.{module.name}"
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    }
    theirs = {point.name: point.module for point in entry_points(group=f"qgrid.{kind}")}
    return theirs | own


def method(name: str) -> MethodModule:
    """The method's module.

    Raises:
        UnknownName: no such method; the message lists the known ones.
        BrokenModule: its module cannot be imported.
    """
    return cast("MethodModule", _load("methods", name))


def support(chosen: Method) -> MethodSupport:
    """What a method can make with its options: its `SUPPORTS`, or what its hook `support` says."""
    module = method(chosen.name)
    own = getattr(module, "support", None)
    return module.SUPPORTS if own is None else cast("MethodSupport", own(chosen.options))


def loader(chosen: Method) -> Callable[[Path, Mapping[str, Any]], Any]:
    """What makes a torch model of the method's artifact: its own `load`, else transformers'.

    It is given the folder and the arguments of `from_pretrained`.
    """
    own = getattr(method(chosen.name), "load", None)

    def load(folder: Path, arguments: Mapping[str, Any]) -> Any:
        from qgrid.libraries import loading

        return (loading.pretrained if own is None else own)(folder, arguments).eval()

    return load


def runtime(name: str) -> RuntimeModule:
    """The runtime's module.

    Raises:
        UnknownName: no such runtime; the message lists the known ones.
        BrokenModule: its module cannot be imported.
    """
    return cast("RuntimeModule", _load("runtimes", name))


def working(kind: Kind) -> dict[str, Any]:
    """Every module that can be imported, by name: what advice may point at."""
    found = {}
    for name in sorted(names(kind)):
        with contextlib.suppress(BrokenModule):
            found[name] = _load(kind, name)
    return found


def _load(kind: Kind, name: str) -> Any:
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise UnknownName(
            f"`{kind[:-1]}={name}` is unknown (has: {', '.join(sorted(known))}){hint}"
        )
    try:
        return importlib.import_module(known[name])
    except ImportError as error:
        raise BrokenModule(
            f"`{kind[:-1]}={name}` cannot be imported from `{known[name]}`: {error}"
        ) from error
