"""`python -m qgrid resume [SWEEP] [--detach]`: go on where it stopped, by the same launcher."""

from __future__ import annotations

from qgrid import commands, launchers

DETACH = "--detach"


def main(arguments: list[str]) -> int:
    """Launch a planned sweep again; the launcher's exit code.

    Raises:
        commands.WrongCommand: other arguments, or no such sweep.
    """
    given = commands.parse("resume", arguments, f"[SWEEP] [{DETACH}] [out=FOLDER]", flags=[DETACH])
    folder = commands.sweep_folder(given)
    return launchers.launch(folder, launchers.chosen(folder), DETACH in given.flags)
