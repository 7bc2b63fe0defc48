"""The store that a verb is about."""

from __future__ import annotations

import errno
from pathlib import Path

from qgrid.commands import Arguments, WrongCommand

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of the whole store, not of one file
PARTS = ("artifacts", "builds", "cells", "quality", "sweeps", "leases", "hashes.json")


def store_of(given: Arguments) -> Path:
    """The folder of `out=`, where it is a store.

    Raises:
        WrongCommand: nothing of a store is in it.
    """
    if not any((given.out / part).exists() for part in PARTS):
        raise WrongCommand(f"no store in {given.out}; run a grid first, or give out=FOLDER")
    return given.out


def is_unwritable(error: BaseException) -> bool:
    """Whether an error is one of the whole store: nothing can be written to it now."""
    return isinstance(error, OSError) and error.errno in UNWRITABLE


def sentence(error: OSError) -> str:
    """An error of the file system as one sentence, with what to do where that is known."""
    if is_unwritable(error):
        where = "the store" if error.filename is None else _without_aside(Path(error.filename))
        remedy = "make it writable" if error.errno == errno.EROFS else "make room"
        return (
            f"{where} cannot be written to ({error.strerror}): what is finished is safe; {remedy} "
            "or give `out=FOLDER`, and the same command goes on"
        )
    if isinstance(error, PermissionError | NotADirectoryError) and error.filename:
        return f"{error.filename}: {error.strerror}; `out=FOLDER` names another place for results"
    return " ".join(str(error).split())


def _without_aside(path: Path) -> Path:
    """The folder where a file was to be written aside, which nobody has heard of."""
    return path.parent if path.name.startswith(".") else path
