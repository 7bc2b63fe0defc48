"""What the verbs of the command line share: `[SWEEP] [out=FOLDER] [--flag]`, checked once."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

OUT = "outputs"


class WrongCommand(ValueError):
    """A command that cannot be carried out as written; the message is one sentence."""


@dataclass(frozen=True)
class Arguments:
    """The parsed words of a verb; `out` is absolute."""

    out: Path
    names: tuple[str, ...]
    flags: frozenset[str]


def parse(
    verb: str, arguments: Sequence[str], usage: str, flags: Collection[str] = (), names: int = 1
) -> Arguments:
    """Split arguments into `out=`, known flags and at most `names` names.

    Raises:
        WrongCommand: another word; the message shows `usage`.
    """
    out, found, given = Path(OUT), [], set()
    for word in arguments:
        if word.startswith("out="):
            out = Path(word.removeprefix("out="))
        elif word in flags:
            given.add(word)
        else:
            found.append(word)
    if len(found) > names or any(word.startswith("-") or "=" in word for word in found):
        raise WrongCommand(f"`qgrid {verb}` takes {usage}, got `{' '.join(arguments)}`")
    return Arguments(out.absolute(), tuple(found), frozenset(given))


def command(verb: str, folder: Path) -> str:
    """The words of a verb for the sweep in `folder`, to be told to the user."""
    store = folder.parents[1]
    where = "" if store == Path(OUT).absolute() else f" {shlex.quote(f'out={store}')}"
    return f"python -m qgrid {verb} {folder.name}{where}"


def sweep_folder(arguments: Arguments) -> Path:
    """The folder of the named sweep, else of the one that was planned last.

    Raises:
        WrongCommand: there is none.
    """
    root = arguments.out / "sweeps"
    folders = {file.parent.name: file.parent for file in root.glob("*/plan.jsonl")}
    if not folders:
        raise WrongCommand(f"no sweep in {root}; run a grid first, or give out=FOLDER")
    if arguments.names:
        name = arguments.names[0]
        if name not in folders:
            raise WrongCommand(f"no sweep `{name}` in {root} (has: {', '.join(sorted(folders))})")
        return folders[name]
    return max(folders.values(), key=lambda each: (each / "plan.jsonl").stat().st_mtime_ns)
