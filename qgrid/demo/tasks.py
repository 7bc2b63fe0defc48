"""The tasks by name, and how one is turned into a conversation."""

from __future__ import annotations

import random

from qgrid.demo.lookup import long_context, recall, retrieval, short_context
from qgrid.demo.numbers import arithmetic, code
from qgrid.demo.problems import Maker, Problem
from qgrid.demo.texts import classification, extraction, structured
from qgrid.demo.world import knowledge

SLICES: dict[str, Maker] = {
    "classification": classification,
    "extraction": extraction,
    "retrieval": retrieval,
    "structured": structured,
    "arithmetic": arithmetic,
    "code": code,
    "knowledge": knowledge,
    "long_context": long_context,
}
SAMPLED: dict[str, Maker] = {**SLICES, "short_context": short_context}  # for other uses than scores
TRAINED: dict[str, Maker] = {**SAMPLED, "recall": recall}

Turn = tuple[str, str]  # role, text


def conversation(problem: Problem) -> list[Turn]:
    """All questions of a problem, one after the other; the context opens the first."""
    turns: list[Turn] = []
    for i, question in enumerate(problem.questions):
        prompt = problem.message(question) if i == 0 else question.prompt
        turns += [("user", prompt), ("assistant", question.answer)]
    return turns


def reordered(problem: Problem, rng: random.Random) -> Problem:
    """The same problem with its questions in another order."""
    questions = rng.sample(problem.questions, len(problem.questions))
    return Problem(problem.level, tuple(questions), problem.context)
