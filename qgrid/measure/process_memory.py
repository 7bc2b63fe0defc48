"""The highest memory of this process since a moment: resident pages, or the CUDA allocator."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of /proc/self/clear_refs: sets VmHWM to the present resident size


class Peak:
    """`with Peak("cpu") as peak: ...` then `peak.bytes`: the peak above the start.

    `ru_maxrss` would not do: it is inherited from the parent. None where the system keeps no
    such figure.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._start: int | None = None
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        if self._kind == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        elif _CLEAR.exists():
            _CLEAR.write_text(_RESET_PEAK)
            self._start = resident_bytes("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._start is None:
            return
        if self._kind == "cuda":
            import torch

            self.bytes = torch.cuda.max_memory_allocated() - self._start
        else:
            self.bytes = resident_bytes("VmHWM") - self._start


def resident_bytes(line: str) -> int:
    """A size from the kernel's status of this process: `VmRSS` now, `VmHWM` at the highest."""
    found = re.search(rf"^{line}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"{_STATUS} has no line {line}")
    return 1024 * int(found[1])
