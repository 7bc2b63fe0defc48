"""Real servers with the embedded model: vLLM's own and llama.cpp's own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from qgrid import models
from qgrid.running import interpreters
from qgrid.types import Model
from tests.servers import processes
from tests.servers.processes import Served

TINY = Model("tiny", models.EMBEDDED, None, False, False)
FOLDER = models.resolve(TINY)
VOCAB = 1536
POSITIONS = 1024
_VLLM = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; else it wants nearly all of the machine's memory
    "TORCHDYNAMO_DISABLE": "1",
}


@contextlib.contextmanager
def vllm(out: Path) -> Iterator[Served]:
    """It may tell log-probabilities of the whole vocabulary.

    Raises:
        interpreters.UnknownInterpreter: vLLM's environment is not built on this machine.
    """
    python = interpreters.interpreter("vllm", "cpu")
    (shown := out / "shown").mkdir()
    environment = interpreters.variables("vllm", shown, "cpu") | _VLLM
    port = processes.free_port()
    options = {
        "--model": str(FOLDER),
        "--served-model-name": "tiny",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "bfloat16",
        "--max-model-len": str(POSITIONS),
        "--max-logprobs": str(VOCAB),
    }
    flags = ["--enforce-eager", "--no-enable-prefix-caching"]
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += [part for pair in options.items() for part in pair] + flags
    with processes.running(command, port, out / "log.txt", environment) as served:
        yield served


@contextlib.contextmanager
def llama(folder: Path, out: Path) -> Iterator[Served]:
    """With the GGUF file in `folder`."""
    port = processes.free_port()
    file = str(next(folder.glob("*.gguf")))
    command = [sys.executable, "-m", "tests.servers.llama", file, str(port), "4", str(POSITIONS)]
    with processes.running(command, port, out / "log.txt") as served:
        yield served
