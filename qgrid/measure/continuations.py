"""Log-probabilities of continuations of a prompt, from full rows or from chosen tokens alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from qgrid.contracts import InvalidEngine

if TYPE_CHECKING:
    from qgrid.contracts import Engine, Scores, TopScores
    from qgrid.measure.slices import Item


@dataclass(frozen=True)
class NoAnswer:
    """A server's failure in the place of values."""

    reason: str


@dataclass(frozen=True)
class Question:
    """Continuations of a prompt whose log-probabilities are wanted."""

    item: Item
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


def logprobs(
    questions: Sequence[Question], engine: Engine
) -> Iterator[list[float]] | Iterator[list[float] | NoAnswer]:
    """Summed log-probability of every continuation, for each question in order.

    Neighbours of one document share the beginning of their prompts, which is prefilled once.

    Raises:
        NoLogprobs: the engine has none to give.
    """
    if getattr(engine, "truncated", False):
        return _of_chosen(questions, engine)
    return _of_rows(questions, engine)


def _of_chosen(questions: Sequence[Question], engine: Engine) -> Iterator[list[float] | NoAnswer]:
    """Every continuation is a text of its own, whose tokens' log-probabilities are told."""
    asked = [(question, ids) for question in questions for ids in question.continuations]
    sequences = [(*question.prompt, *ids) for question, ids in asked]
    ask = getattr(engine, "chosen", engine.score)
    rows = cast("Iterator[TopScores]", ask(sequences, [len(ids) for _, ids in asked]))
    for question in questions:
        found = [next(rows) for _ in question.continuations]
        errors = [each.error for each in found if each.error is not None]
        values = [float(each.chosen.sum()) for each in found]
        if not errors:
            _require_finite(question, values)
        yield NoAnswer(errors[0]) if errors else values


def _of_rows(questions: Sequence[Question], engine: Engine) -> Iterator[list[float]]:
    for document, group in itertools.groupby(questions, key=lambda q: q.item.document):
        together = list(group)
        prefix: tuple[int, ...] = ()
        if document is not None and len(together) > 1:
            prefix = _shared([question.prompt for question in together])
        yield from _scored(together, prefix, engine)


def _shared(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Longest beginning that all prompts have in common."""
    # The first and the last in order differ earliest.
    first, last = min(prompts), max(prompts)
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return tuple(token for token, _ in equal)


def _scored(
    questions: Sequence[Question], prefix: tuple[int, ...], engine: Engine
) -> Iterator[list[float]]:
    sequences: list[tuple[int, ...]] = []
    keep: list[int] = []
    for question in questions:
        for continuation in _asked(question):
            sequences.append((*question.prompt[len(prefix) :], *continuation))
            keep.append(len(continuation))
    rows = cast("Iterator[Scores]", engine.score(sequences, keep, prefix))
    for question in questions:
        if _is_one_row(question):
            row = next(rows).logprobs[0]
            values = [float(row[ids[0]]) for ids in question.continuations]
        else:
            values = [_summed(next(rows).logprobs, ids) for ids in question.continuations]
        _require_finite(question, values)
        yield values


def _require_finite(question: Question, values: Sequence[float]) -> None:
    if not all(math.isfinite(value) for value in values):
        raise InvalidEngine(f"the engine computed NaN or infinity for `{question.item.id}`")


def _asked(question: Question) -> tuple[tuple[int, ...], ...]:
    return question.continuations[:1] if _is_one_row(question) else question.continuations


def _is_one_row(question: Question) -> bool:
    """Whether one distribution answers it: all continuations are different single tokens."""
    firsts = {ids[0] for ids in question.continuations if len(ids) == 1}
    return len(firsts) == len(question.continuations)


def _summed(rows: Any, ids: Sequence[int]) -> float:
    return float(rows.double()[range(len(ids)), list(ids)].sum())
