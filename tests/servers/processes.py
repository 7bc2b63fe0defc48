"""Servers as processes of their own: started on a free port, waited for, killed surely.

`python tests/servers/processes.py PARENT COMMAND ...` runs a command that ends with its parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qgrid.running.worker import die_with, kill_group

ROOT = Path(__file__).parents[2]


@dataclass
class Served:
    """A server that answers at `base_url`."""

    base_url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """As `kill -9` of the server and all that it started; returns when it is gone."""
        kill_group(self.process.pid)
        self.process.wait(10)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str],
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    seconds: float = 600,
) -> Iterator[Served]:
    """Run `command` until its `/v1/models` answers, and for as long as the block."""
    guard = [sys.executable, str(Path(__file__)), str(os.getpid())]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*guard, *command],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=dict(os.environ if environment is None else environment),
            start_new_session=True,
        )
    served = Served(f"http://127.0.0.1:{port}/v1", process)
    try:
        _wait(served, log, time.monotonic() + seconds)
        yield served
    finally:
        served.kill()


def _wait(served: Served, log: Path, until: float) -> None:
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{served.base_url}/models", timeout=5).close()
            return
        tail = log.read_text(errors="replace")[-3000:]
        assert served.process.poll() is None, f"the server ended: {tail}"
        assert time.monotonic() < until, f"the server did not come up: {tail}"
        time.sleep(0.1)


if __name__ == "__main__":
    die_with(int(sys.argv[1]), signal.SIGKILL)
    os.execvp(sys.argv[2], sys.argv[2:])
