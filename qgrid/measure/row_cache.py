"""Baseline rows on disk, so many windows at a time, for two models that do not fit together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

import numpy as np

from qgrid.contracts import Scores
from qgrid.measure.prose import Tokens, Windows, collect, divergence, rows

if TYPE_CHECKING:
    import torch

    from qgrid.contracts import Engine

CACHE_BYTES = 4 * 2**30  # on disk at once


@dataclass
class RowCache:
    """Rows in half precision. `floor` collects the KL that storing them costs, per row."""

    file: IO[bytes]
    chunks: list[tuple[int, int, tuple[int, int]]] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)

    def add(self, scores: Scores) -> int:
        """Append one chunk; the bytes written."""
        import torch

        half = scores.logprobs.to(torch.float16).cpu()
        exact = scores.logprobs.cpu()
        self.floor += divergence(exact, _restored(half)).tolist()
        length, vocab = half.shape
        self.chunks.append((scores.sequence, scores.start, (length, vocab)))
        return self.file.write(half.numpy().tobytes())

    def read(self) -> Iterator[Scores]:
        """The chunks in the order in which they came."""
        import torch

        self.file.seek(0)
        for sequence, start, (length, vocab) in self.chunks:
            raw = self.file.read(2 * length * vocab)
            half = np.frombuffer(raw, dtype=np.float16).reshape(length, vocab)
            yield Scores(sequence, start, _restored(torch.from_numpy(half.copy())))


def _restored(half: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in fp32 that add up to one again."""
    import torch

    return torch.log_softmax(half.float(), dim=-1)


def collect_by_turns(
    tokens: Tokens,
    windows: Windows,
    load_cell: Callable[[], Engine],
    load_baseline: Callable[[], Engine],
) -> float:
    """Fill `tokens` with one model in memory at a time; the mean KL that half precision costs."""
    floor: list[float] = []
    first = 0
    while first < len(windows):
        with tempfile.TemporaryFile() as file:
            cache = RowCache(file)
            count = _write(cache, windows.part(first), load_baseline())
            engine = load_cell()
            part = windows.part(first, first + count)
            collect(tokens, windows, rows(engine, part), cache.read(), first)
            engine.close()
        floor += cache.floor
        first += count
    return float(np.mean(floor))


def _write(cache: RowCache, windows: Windows, baseline: Engine) -> int:
    """Fill the cache with whole windows until it is full; how many."""
    written = 0
    done = 0
    for scores in rows(baseline, windows):
        written += cache.add(scores)
        if scores.start + len(scores.logprobs) == len(windows.ids[scores.sequence]):
            done = scores.sequence + 1
            if written >= CACHE_BYTES:
                break
    baseline.close()
    return done
