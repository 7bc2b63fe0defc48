"""Moving what is broken out of the way: nothing is deleted that somebody might want to look at."""

from __future__ import annotations

import uuid
from pathlib import Path

FOLDER = "set_aside"


def set_aside(store: Path, path: Path) -> Path:
    """Move a file or a folder of the store into `set_aside/`, in one step; where it lies now.

    Its place in the store is free again, so that what it held is made or measured anew.

    Raises:
        OSError: it is gone, or the store cannot be written to.
    """
    room = store / FOLDER
    room.mkdir(exist_ok=True)
    name = ".".join(path.relative_to(store).parts)
    target = room / f"{name}.{uuid.uuid4().hex[:8]}"
    path.rename(target)
    return target
