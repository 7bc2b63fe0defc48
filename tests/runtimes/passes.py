"""Plain forward passes of one sequence, to hold an engine against."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from qgrid.runtimes import transformers as runtime
from qgrid.runtimes._batches import CHUNK_ROWS

Ids = list[int]


def plain(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after every token of one sequence, without batch, padding or cache."""
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=torch.tensor([list(ids)])).logits[0].float(), -1)


def some_ids(rng: random.Random, length: int) -> Ids:
    return [rng.randrange(512) for _ in range(length)]


def distance(
    engine: runtime.Transformers, model: Any, rows: list[Ids], keep: list[int], prefix: Ids
) -> float:
    """Largest difference from plain forward passes; also checks order, places and sizes."""
    chunks: dict[int, list[torch.Tensor]] = {}
    worst = 0.0
    for scores in engine.score(rows, keep, prefix):
        assert len(scores.logprobs) <= CHUNK_ROWS
        assert not chunks or scores.sequence >= max(chunks)
        seen = sum(len(part) for part in chunks.get(scores.sequence, []))
        assert scores.start == len(rows[scores.sequence]) - keep[scores.sequence] + seen
        chunks.setdefault(scores.sequence, []).append(scores.logprobs)
    assert list(chunks) == list(range(len(rows)))
    for i, ids in enumerate(rows):
        found = torch.cat(chunks[i])
        expected = plain(model, prefix + ids)[-keep[i] - 1 : -1]
        assert found.shape == expected.shape
        worst = max(worst, float((found - expected).abs().max()))
    return worst
