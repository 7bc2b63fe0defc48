"""A program: vLLM's own OpenAI server below a guard that ends all of it with its starter.

`python -m qgrid.runtimes._vllm_server ARGUMENT...` takes the arguments of `vllm serve`. The guard
waits for the end of its stdin, which the system closes when the starter ends, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import selectors
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "QGRID_VLLM_FOLDER"  # variable: the server's own, removed in the end
CORES = "QGRID_VLLM_CORES"  # variable: processors that the server may use beside OpenMP's threads
GRACE_SECONDS = 5.0  # to remove its shared memory
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
_POLL_SECONDS = 0.02
_NOTE_SECONDS = 0.5
_SEGMENT = re.compile(r" (/dev/shm/(?:psm_|vllm_dist_)\S+)$", re.MULTILINE)


def main(arguments: Sequence[str]) -> int:
    """Guard the server; ends with its process group."""
    _adopt_orphans()
    server = os.fork()
    if server == 0:
        _end_with_guard()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        return _serve(arguments)
    segments: set[Path] = set()
    alone = _watch(server, segments)
    _end(server, segments)
    if alone:  # else the starter reads the log there
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # the guard too
    return 1


def _adopt_orphans() -> None:
    """Become the parent of what the server leaves behind, to see when it has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_with_guard() -> None:
    """End this process when the guard is killed; its engine and workers end with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _watch(server: int, segments: set[Path]) -> bool:
    """Wait until the starter lets go (true), or the server ends by itself.

    Notes its shared memory while it starts: one that fails in that leaves it behind.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(os.pidfd_open(server), selectors.EVENT_READ)
        while True:
            started = any(Path(os.environ[FOLDER]).glob("census-*"))
            ready = selector.select(None if started else _NOTE_SECONDS)
            if ready:
                return 0 in {key.fd for key, _ in ready}
            segments |= _segments()


def _end(server: int, segments: set[Path]) -> None:
    """Ask the server to end, and wait until all of it has; remove what it leaves behind."""
    segments |= _segments()
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(_POLL_SECONDS)
    for path in segments:
        path.unlink(missing_ok=True)


def _segments() -> set[Path]:
    """Shared memory by which the processes of this group talk to each other."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(entry.name)) == os.getpgrp():
                found |= set(_SEGMENT.findall((entry / "maps").read_text()))
    return {Path(path) for path in found}


def _serve(arguments: Sequence[str]) -> int:
    import uvloop  # type: ignore[import-not-found]
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed: Any = make_arg_parser(FlexibleArgumentParser()).parse_args(list(arguments))
    validate_parsed_serve_args(parsed)
    if CORES in os.environ:
        _fork_on_cpu()
        _unbind({int(core) for core in os.environ[CORES].split(",")})
    uvloop.run(run_server(parsed))
    return 0


def _unbind(cores: set[int]) -> None:
    """Let every thread run anywhere again: while loading, OpenMP has bound this one to one core."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def _fork_on_cpu() -> None:
    """Let vLLM fork its engine and its worker on a CPU as it does on a GPU.

    It would start both afresh, and import everything twice more, so that OpenMP reads its
    variables: they were set before this program began.
    """
    importlib.import_module("vllm.v1.worker.cpu_worker")  # once, before the forks
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def forked(cls: Any, config: Any) -> None:
        original(cls, config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(forked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
