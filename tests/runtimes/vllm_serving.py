"""A program for vLLM's environment: start the server, ask it, say what was seen.

`python -m tests.runtimes.vllm_serving FOLDER CELL OUT` writes a JSON file and ends the server;
with `--stay` it writes the file and waits, to be killed; with `--split` two workers hold the model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from qgrid import codec
from qgrid.contracts import Unsupported
from qgrid.runtimes import _vllm_settings as settings
from qgrid.runtimes import vllm as runtime
from qgrid.types import Cell

NEW_TOKENS = 24


def members(group: int) -> list[int]:
    """Processes of a group that are alive; one that only waits to be reaped is not."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(entry.name)
            if os.getpgid(pid) == group and (entry / "stat").read_text().split()[2] != "Z":
                found.append(pid)
        except OSError:
            continue
    return found


def _streamed(server: Any, prompt: list[int]) -> list[dict[str, Any]]:
    body = {
        "model": server.endpoint.model,
        "prompt": server.prompt(prompt),
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
        **server.endpoint.extra,
    }
    request = urllib.request.Request(
        f"{server.endpoint.base_url}/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as lines:
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


def _asked(server: Any, prompt: list[int]) -> dict[str, Any]:
    begin = dataclasses.asdict(server.memory())
    chunks = [_streamed(server, prompt) for _ in range(2)]
    with urllib.request.urlopen(server.endpoint.metrics) as answer:
        metrics = answer.read().decode()
    return {
        "streams": chunks,
        "metrics": metrics,
        "memory": begin,
        "memory_after": dataclasses.asdict(server.memory()),
        "observed": server.observed(),
        "kernels": dict(server.kernels()),
        "checks": [dataclasses.asdict(check) for check in server.checks()],
        "group": server._process.pid,
        "own_group": os.getpgrp(),
        "processes": members(server._process.pid),
        "folder": str(server._folder),
    }


def main(folder: str, cell: str, out: str, *flags: str) -> None:
    """Start, ask, end."""
    wanted = codec.loads(Cell, Path(cell).read_text())
    if "--split" in flags:
        settings.parallel = lambda cell: 2
    try:
        server = runtime.serve(Path(folder), wanted, wanted.runtime.speed_dtype)
    except (RuntimeError, Unsupported) as error:
        failed = {"failed": f"{type(error).__name__}: {error}"}
        Path(out).write_text(json.dumps(failed))
        return
    found = _asked(server, list(range(5, 69)))
    if "--stay" in flags:
        Path(f"{out}.part").write_text(json.dumps(found))
        Path(f"{out}.part").rename(out)
        time.sleep(600)
    server.close()
    found["after"] = members(found["group"])
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
