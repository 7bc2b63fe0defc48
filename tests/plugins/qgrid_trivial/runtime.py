"""A runtime whose numbers come from the artifact's bytes and its width; it computes at once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qgrid_trivial
from qgrid import codec
from qgrid.contracts import Generation, Memory, TopScores
from qgrid.types import Cell, Check, RuntimeSupport
from qgrid_trivial.method import LEVELS, NUMBERS

LOADS = RuntimeSupport(
    loads={"cpu": ("trivial",), "cuda": ("trivial",)},
    kv_cache={"cpu": ("auto16",), "cuda": ("auto16",)},
    packages=(),
    baseline="trivial",
)
VOCABULARY = 32
STEP_SECONDS = 1e-3  # of a token, as told; nobody waits for it


@dataclass(frozen=True)
class Options:
    """Seconds that a stage takes before it does anything."""

    quality_pause: float
    speed_pause: float


def quality_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """How long the timing takes changes no number of quality."""
    return {"quality_pause": options["quality_pause"]}


class Trivial:
    """See `contracts.Engine`; it tells the likeliest tokens, which are all that it knows."""

    truncated = True

    def __init__(self, artifact: Path, cell: Cell) -> None:
        levels = (artifact / LEVELS).read_bytes()
        found = levels.count(b"\n")
        if found != NUMBERS:
            raise ValueError(f"{artifact / LEVELS} has {found} numbers of {NUMBERS}")
        self._cell = cell
        self._seed = int.from_bytes(hashlib.sha256(levels).digest()[:8], "big")
        self._bits = int(json.loads((artifact / "widths.json").read_text())["bits"])

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int] = ()
    ) -> Iterator[TopScores]:
        for number, (ids, kept) in enumerate(zip(sequences, keep, strict=True)):
            text = sum((place + 1) * token for place, token in enumerate([*prefix, *ids]))
            logits = np.random.default_rng(text).normal(size=(kept, VOCABULARY))
            rounding = np.random.default_rng([text, self._seed]).normal(size=logits.shape)
            logits += 2.0**-self._bits * rounding
            logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            order = np.argsort(-logprobs, axis=1)
            chosen = logprobs[np.arange(kept), list(ids[len(ids) - kept :])]
            ordered = np.take_along_axis(logprobs, order, axis=1)
            yield TopScores(number, len(ids) - kept, order.astype(np.int64), ordered, chosen)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] = ()
    ) -> list[Generation]:
        moments = tuple(STEP_SECONDS * self._bits * (n + 1) / 16 for n in range(max_new_tokens))
        return [Generation((5,) * max_new_tokens, moments) for _ in prompts]

    def memory(self) -> Memory:
        return Memory(weights_bytes=1000 * self._bits, kv_bytes_per_token=64)

    def kernels(self) -> Mapping[str, int]:
        return {"Trivial": 1}

    def observed(self) -> Mapping[str, Any]:
        return {"engine": "trivial", "stored_bits": self._bits}

    def checks(self) -> Sequence[Check]:
        ok = self._bits == self._cell.bits
        return [Check("width", ok, f"{self._cell.bits} bits", f"{self._bits} bits")]

    def close(self) -> None:
        pass


def load(artifact: Path, cell: Cell, dtype: str) -> Trivial:
    stage = "quality" if dtype == cell.runtime.dtype else "speed"
    name = codec.digest(cell)
    qgrid_trivial.note(stage=stage, event="begin", cell=name, artifact=artifact.name)
    time.sleep(cell.runtime.options[f"{stage}_pause"])
    qgrid_trivial.wait_at_gate(f"{stage}-{name}")
    engine = Trivial(artifact, cell)
    qgrid_trivial.note(stage=stage, event="end", cell=name, artifact=artifact.name)
    return engine
