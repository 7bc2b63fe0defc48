"""Hearing what llama.cpp says to whoever set a callback: one, for the whole process."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp


@contextmanager
def listening() -> Iterator[list[str]]:
    """What is said inside the block; the callback before it is put back, as this one dies."""
    heard: list[str] = []
    own = llama_cpp.llama_log_callback(lambda _, text, __: heard.append(text.decode()))
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(own, ctypes.c_void_p())
    try:
        yield heard
    finally:
        llama_cpp.llama_log_set(before, data)
