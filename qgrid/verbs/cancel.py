"""`python -m qgrid cancel SWEEP`: end a sweep, here and in the queues; what has ended stays."""

from __future__ import annotations

from qgrid import commands
from qgrid.verbs import standings


def main(arguments: list[str]) -> int:
    """End what every launcher has under way for a sweep; 0, or 1 where one cannot.

    Raises:
        commands.WrongCommand: other arguments, or no such sweep.
    """
    given = commands.parse("cancel", arguments, "SWEEP [out=FOLDER]")
    if not given.names:  # the sweep that was planned last may not be the one that is meant
        raise commands.WrongCommand("`qgrid cancel` takes SWEEP [out=FOLDER], got no name")
    folder = commands.sweep_folder(given)
    done: list[str] = []
    failed: list[str] = []
    for launcher in standings.launchers_with("cancel"):
        try:
            done += launcher.cancel(folder)
        except RuntimeError as error:  # its commands are not on this machine, or fail
            failed.append(f"not cancelled: {error}")
    for line in [*done, *failed] or ["nothing of it runs or waits"]:
        print(line)  # noqa: T201
    return 1 if failed else 0
