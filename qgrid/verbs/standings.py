"""What the queues of all launchers say of a sweep, whichever was used last."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

from qgrid import launchers
from qgrid.queued import Standing


def launchers_with(hook: str) -> list[Any]:
    """The launchers that offer a hook: `standing(folder)`, `cancel(folder)`."""
    names = [each.name for each in pkgutil.iter_modules(launchers.__path__)]
    found = [launchers.module(name) for name in names if not name.startswith("_")]
    return [each for each in found if hasattr(each, hook)]


def of(folder: Path) -> tuple[dict[str, Standing], list[str]]:
    """Where cells stand in queues, by cell id; and a sentence for each queue that does not tell."""
    found: dict[str, Standing] = {}
    silent = []
    for launcher in launchers_with("standing"):
        try:
            found |= launcher.standing(folder)
        except RuntimeError as error:
            silent.append(str(error))
    return found, silent
