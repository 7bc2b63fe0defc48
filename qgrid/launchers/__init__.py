"""Where the cells of a plan run: one file a launcher, named as in `conf/hydra/launcher/`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from qgrid import codec
from qgrid.files import write_atomic

FILE = "launcher.json"  # in the sweep's folder: what `resume` starts again


class Launcher(Protocol):
    """A file of this folder.

    It may also offer:

    * `standing(folder) -> dict[str, Standing]`: where cells stand that are neither done nor running
      here, by cell id (`qgrid/queued.py`);
    * `cancel(folder) -> list[str]`: end what it has under way for a sweep; a line for each.
    """

    REMOTE: bool  # cells run on other machines: `gpu=auto` means nothing there
    Options: type  # frozen dataclass of what its YAML may say

    def launch(self, folder: Path, options: Any, detach: bool) -> int:
        """Bring the planned cells of a sweep's folder to records; the exit code.

        `detach`: start, say how to look, and return.
        """


@dataclass(frozen=True)
class Chosen:
    """A launcher by name with its options, plain, as checked; and where the command was given."""

    name: str
    options: Mapping[str, Any]
    start: str | None = None  # folder that relative paths of cells begin at
    config_dir: str | None = None  # other folders for them, as `--config-dir` gave them


def module(name: str) -> Launcher:
    """The launcher of that name."""
    return cast("Launcher", importlib.import_module(f"qgrid.launchers.{name}"))


def choose(name: str, options: Mapping[str, Any]) -> Chosen:
    """A launcher with its options checked.

    Raises:
        codec.InvalidValue: an option, its value and what is allowed.
    """
    checked: Any = codec.convert(module(name).Options, options, "hydra.launcher")
    return Chosen(name, codec.plain(checked))


def keep(folder: Path, chosen: Chosen) -> None:
    """Write down what was chosen, for `resume`."""
    if chosen.start is None:
        own = os.environ.get("QGRID_CONFIG_DIR")
        chosen = replace(chosen, start=str(Path.cwd()), config_dir=own)
    write_atomic(folder / FILE, codec.dumps(chosen, indent=1) + "\n")


def launch(folder: Path, chosen: Chosen, detach: bool) -> int:
    """Bring a sweep's cells to records, or begin to; the exit code."""
    keep(folder, chosen)
    each = module(chosen.name)
    options: Any = codec.convert(each.Options, chosen.options, "hydra.launcher")
    return each.launch(folder, options, detach)


def chosen(folder: Path) -> Chosen:
    """What a sweep was launched with last; here, where it was never launched."""
    try:
        return codec.read(Chosen, folder / FILE)
    except FileNotFoundError:
        return choose("local", {"slots": None})
