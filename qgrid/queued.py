"""Where a cell stands that a remote launcher was given: what its queue says, in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Standing:
    """One cell in the queue of a launcher, as of its latest task."""

    state: Literal["queued", "running", "ended"]
    task: str  # the queue's own name of it
    why: str  # the queue's reason, or how the task ended
    host: str | None = None
