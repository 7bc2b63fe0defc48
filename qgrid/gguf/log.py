"""What llama.cpp says: its log captured instead of printed, its complaints made exceptions."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# `ggml_log_level` of ggml.h
DEBUG, WARNING, ERROR, CONTINUED = 1, 3, 4, 5
_OUT_OF_MEMORY = re.compile(r"(failed|unable) to allocate|out of memory", re.IGNORECASE)


class LlamaError(RuntimeError):
    """llama.cpp failed; the message says at what, and what it logged."""


@dataclass
class Log:
    """Messages of one or more calls as (level, text); those for debugging are kept apart."""

    messages: list[tuple[int, str]] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    _keeps: bool = True

    def add(self, level: int, text: str) -> None:
        """Keep one message, or the rest of the one before."""
        if level != CONTINUED:
            self._keeps = level != DEBUG
        if not self._keeps:
            self.details.append(text)
            return
        if level == CONTINUED and self.messages:
            first, begun = self.messages[-1]
            self.messages[-1] = (first, begun + text)
        else:
            self.messages.append((level, text))

    @property
    def lines(self) -> list[str]:
        """The lines of all messages; a line may have come in several."""
        whole = "".join(text for _, text in self.messages).splitlines()
        return [line.strip() for line in whole if line.strip()]

    @property
    def detail_lines(self) -> list[str]:
        """The lines of the messages for debugging."""
        return [line.strip() for line in "".join(self.details).splitlines()]

    def problems(self) -> str:
        """Errors, else warnings, in one line; empty where there are none."""
        for wanted in (ERROR, WARNING):
            found = (text.strip(" \n=") for level, text in self.messages if level == wanted)
            if told := "; ".join(dict.fromkeys(" ".join(text.split()) for text in found if text)):
                return told
        return ""

    def error(self, what: str) -> Exception:
        """The exception for a failed call: a `MemoryError` where memory was refused."""
        why = self.problems() or "no reason given"
        kind = MemoryError if _OUT_OF_MEMORY.search(why) else LlamaError
        return kind(f"llama.cpp cannot {what}: {why}")


_active: list[Log] = []  # the log that is being written is the last


@functools.cache
def _callback() -> Any:
    """The C function that receives every message; kept for as long as the process lives."""
    import llama_cpp

    def receive(level: int, text: bytes, _: Any) -> None:
        if _active:
            _active[-1].add(level, text.decode("utf-8", "replace"))

    return llama_cpp.llama_log_callback(receive)


@contextmanager
def captured() -> Iterator[Log]:
    """Collect what the library logs inside the block; whoever received it before does so after."""
    import llama_cpp

    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(_callback(), ctypes.c_void_p())
    _active.append(Log())
    try:
        yield _active[-1]
    finally:
        _active.pop()
        llama_cpp.llama_log_set(before, data)


def error(what: str) -> Exception:
    """The exception for a C call that failed inside `captured()`."""
    return _active[-1].error(what)
