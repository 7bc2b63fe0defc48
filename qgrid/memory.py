"""Peak memory of a block of work, on Linux without what the process inherited."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Highest resident memory of this process since entry, above what it held at entry.

    Where the kernel does not say (`/proc` missing), reads 0.
    """

    def __enter__(self) -> PeakMemory:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # resets the high-water mark, which fork inherits
        self._start = _kib("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def read(self) -> int:
        """Bytes above the start, up to now."""
        return max(0, _kib("VmHWM") - self._start) * 1024


def _kib(key: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    found = next((line for line in lines if line.startswith(key + ":")), None)
    return int(found.split()[1]) if found else 0
