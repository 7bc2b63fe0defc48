"""Processes whose numbers mean nothing to others, as on another machine, in their own namespace."""

from __future__ import annotations

import os
import subprocess

import pytest

_AS_ROOT = () if os.geteuid() == 0 else ("--user", "--map-root-user")
UNDER = ("unshare", *_AS_ROOT, "--pid", "--fork", "--mount-proc", "--kill-child", "--")


def require() -> None:
    """Skip where no such namespace may be made."""
    try:
        tried = subprocess.run([*UNDER, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs `unshare` of util-linux")
    if tried.returncode:
        pytest.skip(f"needs the right to make a namespace of processes: {tried.stderr.strip()}")
