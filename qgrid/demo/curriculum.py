"""What each step trains: shares of tasks and levels that follow the measured accuracy."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from qgrid.demo.problems import LEVELS, draw
from qgrid.demo.prose import prose
from qgrid.demo.rows import Encoder, Row
from qgrid.demo.seeds import Split, document_rng
from qgrid.demo.tasks import TRAINED, conversation
from qgrid.demo.world import TIER_WEIGHTS

CHARS_PER_TOKEN = 5
UNLOCK_ACCURACY = 0.6
UNLOCK_PROGRESS = 0.2  # each level opens after this share of the run at the latest
MEMORY = 0.98  # of the running mean of accuracies
BASE_SHARE = {
    "classification": 0.7,
    "extraction": 1.8,
    "retrieval": 1.4,
    "structured": 0.8,
    "arithmetic": 1.2,
    "code": 1.2,
    "knowledge": 1.0,
    "short_context": 1.0,
    "long_context": 0.0,
    "recall": 0.3,
}
LONG_FROM, LONGEST_FROM = 0.55, 0.85  # share of the run


@dataclass
class Curriculum:
    """Running accuracy per task and level, and the number of documents drawn so far."""

    encoder: Encoder
    seed: int = 0
    prose_share: float = 0.25
    prose_weight: float = 0.25
    num_documents: int = 0
    accuracy: dict[str, list[float]] = field(
        default_factory=lambda: {name: [0.0] * len(LEVELS) for name in TRAINED}
    )

    def observe(self, kinds: Iterable[tuple[str, int]], right: Iterable[float]) -> None:
        """Move the running means by the share of right answers of each row."""
        for (task, level), share in zip(kinds, right, strict=True):
            if level:
                old = self.accuracy[task][level - 1]
                self.accuracy[task][level - 1] = MEMORY * old + (1 - MEMORY) * share

    def task_shares(self, progress: float) -> dict[str, float]:
        """Share of the task tokens, larger where accuracy lags."""
        base = dict(BASE_SHARE)
        if progress >= LONG_FROM:
            base["short_context"], base["long_context"] = 0.5, 1.0
        if progress >= LONGEST_FROM:
            base["short_context"], base["long_context"] = 0.3, 3.0
        if self.accuracy["retrieval"][0] < UNLOCK_ACCURACY:
            base["short_context"] *= 0.1
            base["recall"] *= 10
        return {
            name: share * (1.4 - sum(self.accuracy[name]) / len(LEVELS))
            for name, share in base.items()
            if share > 0
        }

    def level_shares(self, task: str, progress: float) -> list[float]:
        """Share of each level: closed levels hardly at all, lagging ones more."""
        if task == "knowledge":
            return list(TIER_WEIGHTS)
        if task == "long_context":
            return [1.0] * 5 if progress >= LONGEST_FROM else [1.0, 0.5, 0.2, 0.0, 0.0]
        accuracy = self.accuracy[task]
        shares = []
        for i, own in enumerate(accuracy):
            is_open = i == 0 or accuracy[i - 1] > UNLOCK_ACCURACY or progress > UNLOCK_PROGRESS * i
            shares.append(1.3 - own if is_open else 0.03)
        return shares

    def next_rows(self, num_tokens: int, progress: float) -> list[Row]:
        """Rows of about `num_tokens` tokens: prose, and tasks by their shares."""
        rows = self._fill(self.prose_share * num_tokens, lambda: self._prose_row(progress))
        shares = self.task_shares(progress)
        total = sum(shares.values())
        for task, share in shares.items():
            levels = self.level_shares(task, progress)
            budget = num_tokens * (1 - self.prose_share) * share / total
            rows += self._fill(budget, partial(self._task_row, task, levels))
        return rows

    def _fill(self, budget: float, make: Callable[[], Row]) -> list[Row]:
        """Rows of `budget` tokens; a last row that overshoots is kept by chance."""
        rows: list[Row] = []
        while budget > 0:
            row = make()
            if len(row.ids) > budget and self._rng().random() > budget / len(row.ids):
                break
            rows.append(row)
            budget -= len(row.ids)
        return rows

    def _rng(self) -> random.Random:
        """The generator of the next document."""
        self.num_documents += 1
        return document_rng(Split.TRAIN, (self.seed << 32) + self.num_documents)

    def _prose_row(self, progress: float) -> Row:
        """Prose of 256 to 1k tokens, from `LONGEST_FROM` on of 1k to 4k."""
        rng = self._rng()
        lengths = (1024, 2048, 4096) if progress >= LONGEST_FROM else (256, 512, 512, 1024)
        length = rng.choice(lengths)
        return self.encoder.prose(prose(rng, length * CHARS_PER_TOKEN), length, self.prose_weight)

    def _task_row(self, task: str, levels: list[float]) -> Row:
        """A conversation of one task."""
        rng = self._rng()
        level = rng.choices(LEVELS, levels)[0]
        problem = draw(TRAINED[task], rng, level, Split.TRAIN)
        return self.encoder.chat(conversation(problem), (task, level))
