"""A program for vLLM's environment: load engines, do what a list of tasks says, save the results.

`python -m tests.runtimes.vllm_session TASKS OUT`: a JSON list of `{name, do, folder, cell, ...}`,
and the file that receives a dictionary of results, read with `torch.load`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qgrid import codec
from qgrid.contracts import Unsupported
from qgrid.runtimes import _vllm_checks, _vllm_engine, _vllm_formats
from qgrid.runtimes import _vllm_settings as settings
from qgrid.runtimes import vllm as runtime
from qgrid.types import Cell

Task = dict[str, Any]


def _cell(task: Task, key: str = "cell") -> Cell:
    return codec.loads(Cell, json.dumps(task[key]))


def _split(task: Task) -> None:
    """Split the model as on so many GPUs: vLLM's CPU workers stand for them."""
    parts = task.get("parallel", 1)
    settings.parallel = lambda cell: parts


def _rows(engine: Any, task: Task) -> list[list[tuple[int, torch.Tensor]]]:
    """Chunks of every sequence as they came; order and size are the test's to judge."""
    found: list[list[tuple[int, torch.Tensor]]] = [[] for _ in task["sequences"]]
    order = []
    for scores in engine.score(task["sequences"], task["keep"], task.get("prefix", ())):
        order.append(scores.sequence)
        found[scores.sequence].append((scores.start, scores.logprobs))
    assert order == sorted(order)
    return found


def _told(engine: Any) -> dict[str, Any]:
    return {
        "observed": engine.observed(),
        "kernels": dict(engine.kernels()),
        "memory": dataclasses.asdict(engine.memory()),
        "checks": [dataclasses.asdict(check) for check in engine.checks()],
        "positions": engine.positions,
    }


def score(task: Task) -> dict[str, Any]:
    """Log-probabilities of sequences, and what the engine tells of itself."""
    _split(task)
    engine = runtime.load(Path(task["folder"]), _cell(task), task["dtype"])
    found: dict[str, Any] = {"told": _told(engine), "rows": _rows(engine, task)}
    found["other_checks"] = [
        [dataclasses.asdict(c) for c in _vllm_checks.checks(engine._census, other, 1)]
        for other in (codec.loads(Cell, json.dumps(each)) for each in task.get("others", []))
    ]
    found["prefixed"] = [_rows(engine, each) for each in task.get("more", [])]
    found["made"] = [
        [(made.ids, made.seconds) for made in engine.generate(*arguments)]
        for arguments in task.get("prompts", [])
    ]
    workers, sockets = engine._census.pids, engine._sockets
    begun: Any = engine.score(task["sequences"], task["keep"])
    next(begun)
    engine.close()
    begun.close()  # what was not read to its end may outlive the engine
    found["left"] = [pid for pid in workers if pid != os.getpid() and _alive(pid)]
    found["sockets_left"] = sockets is not None and sockets.exists()
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def together(task: Task) -> dict[str, Any]:
    """Two engines take turns; one goes on after the other was closed; a new one follows."""
    first, second = (
        runtime.load(Path(folder), _cell(task), task["dtype"]) for folder in task["folders"]
    )
    alone = _rows(first, task)
    keep = (task["sequences"], task["keep"])
    pairs = zip(first.score(*keep), second.score(*keep), strict=True)
    turns = [(one.logprobs, other.logprobs) for one, other in pairs]
    second.close()
    after = _rows(first, task)
    first.close()
    again = runtime.load(Path(task["folders"][1]), _cell(task), task["dtype"])
    last = _rows(again, task)
    again.close()
    return {"alone": alone, "turns": turns, "after": after, "last": last}


def refused(task: Task) -> dict[str, Any]:
    """What vLLM itself does with a checkpoint, our own refusal left out."""
    _split(task)
    cell = _cell(task)
    try:
        runtime.load(Path(task["folder"]), cell, task["dtype"])
    except Unsupported as error:
        ours = str(error)
    else:
        ours = ""
    _vllm_engine.prepare(cell)
    try:
        engine = _vllm_engine.Vllm(Path(task["folder"]), cell, task["dtype"])
        list(engine.score([[5, 6, 7, 8]], [3]))
    except (ValueError, RuntimeError, AssertionError) as error:
        return {"ours": ours, "theirs": f"{type(error).__name__}: {error}"}
    return {"ours": ours, "theirs": ""}


DO: dict[str, Callable[[Task], dict[str, Any]]] = {
    "score": score,
    "together": together,
    "refused": refused,
}


def main(tasks: str, out: str) -> None:
    """Do the tasks one after the other."""
    assert _vllm_formats.FORMATS
    torch.save({t["name"]: DO[t["do"]](t) for t in json.loads(Path(tasks).read_text())}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
