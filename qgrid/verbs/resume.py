"""`python -m qgrid resume [SWEEP] [--detach]`: go on where it stopped, by the same launcher."""

from __future__ import annotations

import contextlib
import os

from qgrid import commands, launchers

DETACH = "--detach"


def main(arguments: list[str]) -> int:
    """Launch a planned sweep again; the launcher's exit code.

    Raises:
        commands.WrongCommand: other arguments, or no such sweep.
    """
    given = commands.parse("resume", arguments, f"[SWEEP] [{DETACH}] [out=FOLDER]", flags=[DETACH])
    folder = commands.sweep_folder(given)
    chosen = launchers.chosen(folder)
    _return_to(chosen)
    return launchers.launch(folder, chosen, DETACH in given.flags)


def _return_to(chosen: launchers.Chosen) -> None:
    """Find relative paths of cells as the first command did, wherever this one is given."""
    if chosen.start is not None:
        with contextlib.suppress(FileNotFoundError):  # cells with whole paths do without it
            os.chdir(chosen.start)
    if chosen.config_dir is not None:
        os.environ.setdefault("QGRID_CONFIG_DIR", chosen.config_dir)
