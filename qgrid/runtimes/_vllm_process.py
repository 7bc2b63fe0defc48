"""vLLM's OpenAI server as a child of this process: start, wait, look inside, end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qgrid
from qgrid import codec
from qgrid.contracts import Endpoint, Memory, Unsupported
from qgrid.runtimes import _vllm_checks, _vllm_formats, _vllm_server, _vllm_worker
from qgrid.runtimes import _vllm_settings as settings
from qgrid.runtimes._vllm_census import Census, joined

if TYPE_CHECKING:
    from qgrid.types import Cell, Check

START_SECONDS = 1800.0  # a large checkpoint takes long to read; the stage has its own limit
_POLL_SECONDS = 0.05
_TAIL_LINES = 30
_NAME = "model"
_HOST = "127.0.0.1"
# The end of a traceback, behind the name of its process; pydantic puts the reason a line below.
_ERROR = re.compile(
    r"^(?:\(\w+ pid=\d+\) )?(?:ERROR .*?\] )?([\w.]*(?:Error|Exception): .+(?:\n.*Value error.+)?)",
    re.MULTILINE,
)


class ServerFailed(RuntimeError):
    """The server ended, or was not ready in time; the message holds the last lines of its log."""


class VllmServer:
    """A running server (a `Server`)."""

    def __init__(self, artifact: Path, cell: Cell, dtype: str) -> None:
        self._cell = cell
        self._dtype = dtype
        self._port = reserved_port()
        port = self._port.getsockname()[1]
        arguments = settings.server_arguments(artifact, cell, dtype) | {
            "host": _HOST,
            "port": port,
            "served_model_name": _NAME,
            "shutdown_timeout": 3,
            "worker_cls": f"{_vllm_worker.__name__}.Worker",
            "uvicorn_log_level": "warning",
            "disable_uvicorn_access_log": True,
        }
        base = f"http://{_HOST}:{port}"
        self.endpoint = Endpoint(
            f"{base}/v1", _NAME, extra={"ignore_eos": True}, metrics=f"{base}/metrics", own=True
        )
        begin = time.perf_counter()
        self._folder = Path(tempfile.mkdtemp(prefix="qgrid-vllm-"))
        self._process = self._start(settings.command_line(arguments))
        try:
            self._wait(f"{base}/health", begin + START_SECONDS)
            self._census = self._read_census()
        except BaseException:
            self.close()
            raise
        self._start_seconds = time.perf_counter() - begin

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """Token ids, which the server takes as they are."""
        return list(ids)

    def memory(self) -> Memory:
        """See `Loaded.memory`; on a CPU peaks are those since the start."""
        census = self._census
        on_cpu = self._cell.gpu.kind == "cpu"
        return Memory(
            weights_bytes=census.weights_bytes,
            kv_bytes_per_token=census.kv_bytes_per_token,
            peak_bytes=self._peak_bytes() if on_cpu else census.reserved_bytes,
            kv_pool_bytes=census.kv_pool_bytes,
            activation_peak_bytes=(self._grown_bytes() if on_cpu else census.activation_peak_bytes),
            reserved_bytes=census.resident_bytes if on_cpu else census.reserved_bytes,
            max_concurrency=census.max_concurrency(self._cell.context),
        )

    def kernels(self) -> Mapping[str, int]:
        """See `Loaded.kernels`."""
        return _vllm_checks.kernels(self._census)

    def observed(self) -> Mapping[str, Any]:
        """See `Loaded.observed`; what the worker process of the server says of itself."""
        return {
            **_vllm_checks.observed(self._census, self._cell, self._dtype),
            "server_start_seconds": self._start_seconds,
            "server_processes": len(self._processes()),
        }

    def checks(self) -> Sequence[Check]:
        """See `Loaded.checks`."""
        threads = len(settings.cores(self._cell, served=True))
        return _vllm_checks.checks(self._census, self._cell, threads)

    def close(self) -> None:
        """End the server and everything that it started."""
        process = self._process
        assert process.stdin is not None
        process.stdin.close()  # the guard ends it, and removes the folder
        try:
            process.wait(_vllm_server.GRACE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._port.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self._folder / "log.txt").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", _vllm_server.__name__, *arguments],
                stdin=subprocess.PIPE,  # its end is the server's end
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        found = {**os.environ, **settings.environment(self._cell, served=True)}
        found.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        found["VLLM_LOGGING_LEVEL"] = "INFO"
        found[_vllm_server.FOLDER] = str(self._folder)
        found["TMPDIR"] = str(self._folder)
        found[_vllm_worker.CENSUS] = str(self._folder)
        root = str(Path(qgrid.__file__).parents[1])
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, found.get("PYTHONPATH"))))
        found.pop("VLLM_USE_V2_MODEL_RUNNER", None)
        found.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
        if self._cell.gpu.kind == "cpu" and settings.parallel(self._cell) == 1:
            found |= _openmp(settings.cores(self._cell, served=True))
        return found

    def _read_census(self) -> Census:
        """What all workers wrote before the server answered."""
        ranks = range(settings.parallel(self._cell))
        paths = [_vllm_worker.census_path(self._folder, rank) for rank in ranks]
        return joined([codec.loads(Census, path.read_text(encoding="utf-8")) for path in paths])

    def _wait(self, url: str, deadline: float) -> None:
        while not _answers(url):
            if self._process.poll() is not None:
                raise self._failure("ended before it was ready")
            if time.perf_counter() > deadline:
                raise self._failure(f"was not ready in {START_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)

    def _failure(self, what: str) -> Exception:
        log = (self._folder / "log.txt").read_text(errors="replace")
        lines = log.splitlines()
        errors = [" ".join(found.split()) for found in _ERROR.findall(log)]
        refused = next(filter(None, map(_vllm_formats.refused, errors)), None)
        if refused is not None:
            return Unsupported(refused)
        first = errors[0] if errors else (lines[-1] if lines else "it wrote nothing")
        tail = "\n".join(lines[-_TAIL_LINES:])
        return ServerFailed(f"vLLM's server {what}: {first}\n{tail}")

    def _processes(self) -> list[int]:
        """All processes of the server's group that are alive."""
        import psutil

        try:
            found = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [each.pid for each in found]

    def _peak_bytes(self) -> int | None:
        """Highest memory of all processes: what each has for itself, and once what they share."""
        sizes = [found for found in map(_sizes, self._processes()) if found]
        if not sizes:
            return None
        own = sum(found["VmHWM"] - found["RssFile"] for found in sizes)
        return own + max(found["RssFile"] for found in sizes)

    def _grown_bytes(self) -> int | None:
        """How far the workers have grown above weights and a touched pool."""
        sizes = [_sizes(pid) for pid in self._census.pids]
        if not all(sizes) or self._census.resident_bytes is None:
            return None
        return max(0, sum(size["VmHWM"] for size in sizes) - self._census.resident_bytes)


def _openmp(cores: Sequence[int]) -> dict[str, str]:
    """OpenMP's threads, each bound to its core, as vLLM does it for a worker that it starts."""
    import torch

    listed = " ".join(map(str, cores))
    found = {
        "OMP_NUM_THREADS": str(len(cores)),
        "GOMP_CPU_AFFINITY": listed,
        _vllm_worker.MAIN_CORE: str(cores[0]),
        _vllm_server.CORES: ",".join(map(str, _others(cores))),
    }
    packages = Path(torch.__file__).parents[1]
    libraries = [
        *packages.glob("torch.libs/libgomp*.so*"),
        *packages.glob("torch/lib/libgomp*.so*"),
    ]
    before = os.environ.get("LD_PRELOAD", "")
    if libraries and "libgomp" not in before:
        found["LD_PRELOAD"] = ":".join(filter(None, (before, str(libraries[0]))))
    return found


def _others(cores: Sequence[int]) -> list[int]:
    """Processors that are left to the rest of the server; all, where none is left."""
    usable = os.sched_getaffinity(0)
    return sorted(usable - set(cores)) or sorted(usable)


def reserved_port() -> socket.socket:
    """A socket whose port nobody is given by chance, until the server, which names it, binds it.

    It never listens, so that connections go to the server alone.
    """
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server's own
    one.bind((_HOST, 0))
    return one


def _answers(url: str) -> bool:
    """Whether the server is ready; a proxy that the environment names is not asked."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, OSError):
        return False


def _sizes(pid: int) -> dict[str, int]:
    """Resident bytes of a process by kind; empty when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    found = re.findall(r"^(VmHWM|RssFile|VmRSS):\s+(\d+) kB$", text, re.MULTILINE)
    sizes = {name: 1024 * int(size) for name, size in found}
    return sizes if len(sizes) == 3 else {}
