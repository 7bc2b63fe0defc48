"""Processes whose numbers mean nothing to others, as on another machine, in their own namespace."""

from __future__ import annotations

import subprocess

import pytest

UNDER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--")


def require() -> None:
    """Skip where no such namespace may be made."""
    try:
        tried = subprocess.run([*UNDER, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs `unshare` of util-linux")
    if tried.returncode:
        pytest.skip(f"needs the right to make a namespace of processes: {tried.stderr.strip()}")
