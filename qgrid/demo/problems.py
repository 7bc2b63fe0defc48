"""What a generated task is: a context, questions, and where the answer is drawn from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from qgrid.demo.seeds import Split, belongs

LEVELS = range(1, 6)
CHOICES = 4


@dataclass(frozen=True)
class Question:
    """One question with its right answer; `choices` is empty when the reply is generated."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    schema: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A context (may be empty) and the questions about it."""

    level: int
    questions: tuple[Question, ...]
    context: str = ""

    @property
    def content(self) -> str:
        """What decides the split: the context, or the lone question."""
        return self.context or self.questions[0].prompt

    def message(self, question: Question) -> str:
        """The user message that asks one question first."""
        return f"{self.context}\n\n{question.prompt}" if self.context else question.prompt


Maker = Callable[[random.Random, int, Split], Problem]


def draw(maker: Maker, rng: random.Random, level: int, split: Split) -> Problem:
    """Draw problems until one belongs to the split."""
    while True:
        problem = maker(rng, level, split)
        if belongs(problem.content, split):
            return problem


def shuffled_choices(
    rng: random.Random, answer: str, others: Iterable[str], count: int = CHOICES
) -> tuple[str, ...]:
    """The answer among distinct others, in random order; earlier others are preferred."""
    wrong = [other for other in dict.fromkeys(others) if other != answer][: count - 1]
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return tuple(choices)


def sampled_choices(
    rng: random.Random, answer: str, near: Iterable[str], pool: tuple[str, ...]
) -> tuple[str, ...]:
    """Like `shuffled_choices`, with up to two near misses and the rest from the pool."""
    close = [other for other in dict.fromkeys(near) if other != answer]
    rng.shuffle(close)
    return shuffled_choices(rng, answer, [*close[:2], *rng.sample(pool, len(pool))])
