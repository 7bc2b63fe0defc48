"""Items of a slice put to an engine: choices by log-probability, replies by text or JSON value."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jsonschema

from qgrid import stats
from qgrid.contracts import InvalidEngine
from qgrid.measure.compare import clusters_of
from qgrid.metrics import METRICS
from qgrid.types import Measurement

if TYPE_CHECKING:
    from qgrid.contracts import Engine
    from qgrid.measure.encoding import Encoder
    from qgrid.measure.slices import Item
    from qgrid.types import Slice

GENERATED_TOGETHER = 64
GENERATED_TOKENS = 32768  # that one batch may hold in its KV cache


@dataclass(frozen=True)
class Answered:
    """The result of one item: a line of `items.jsonl`."""

    slice: str
    id: str
    level: int
    document: str | None
    correct: bool
    answer_logprob: float  # nats, summed over the tokens of the right answer
    reply: str  # the chosen or generated text


@dataclass(frozen=True)
class _Question:
    """Continuations of a prompt whose log-probabilities are wanted."""

    item: Item
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


def answer(
    name: str, wanted: Slice, items: Sequence[Item], engine: Engine, encoder: Encoder
) -> list[Answered]:
    """Evaluate all items of a slice, in their order.

    Raises:
        InvalidEngine: a log-probability is NaN or infinite.
        TooLong: an item and its reply take more tokens than the model has positions.
    """
    prompts = encoder.prompts([item.message for item in items], wanted.chat)
    if wanted.scoring == "choice":
        return _by_choice(name, items, prompts, engine, encoder)
    return _by_reply(name, wanted, items, prompts, engine, encoder)


def _require_positions(
    name: str, questions: Sequence[_Question], new_tokens: int, encoder: Encoder
) -> None:
    """Refuse an item that is too long with its longest continuation or `new_tokens`."""
    for question in questions:
        reply = max(new_tokens, *map(len, question.continuations))
        what = f"item `{question.item.id}` of slice `{name}` with its reply"
        encoder.require_positions(len(question.prompt) + reply, what)


def _by_choice(
    name: str,
    items: Sequence[Item],
    prompts: Sequence[Sequence[int]],
    engine: Engine,
    encoder: Encoder,
) -> list[Answered]:
    questions = [
        _Question(item, tuple(prompt), tuple(tuple(encoder.text(c)) for c in item.choices))
        for item, prompt in zip(items, prompts, strict=True)
    ]
    _require_positions(name, questions, 0, encoder)
    scored = zip(items, logprobs(questions, engine), strict=True)
    return [_chosen(name, item, values) for item, values in scored]


def _chosen(name: str, item: Item, values: Sequence[float]) -> Answered:
    best = max(range(len(values)), key=values.__getitem__)
    right = item.choices.index(item.answer)
    return Answered(
        name, item.id, item.level, item.document, best == right, values[right], item.choices[best]
    )


def _by_reply(  # noqa: PLR0913, PLR0917 - one call site
    name: str,
    wanted: Slice,
    items: Sequence[Item],
    prompts: Sequence[Sequence[int]],
    engine: Engine,
    encoder: Encoder,
) -> list[Answered]:
    questions = [
        _Question(item, tuple(prompt), (tuple(encoder.text(item.answer)),))
        for item, prompt in zip(items, prompts, strict=True)
    ]
    _require_positions(name, questions, wanted.max_new_tokens, encoder)
    replies = _generated(prompts, wanted.max_new_tokens, engine, encoder)
    right = _is_json_right if wanted.scoring == "json" else _is_text_right
    return [
        Answered(
            name, item.id, item.level, item.document, right(reply, item), values[0], reply.strip()
        )
        for item, reply, values in zip(items, replies, logprobs(questions, engine), strict=True)
    ]


def _generated(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, engine: Engine, encoder: Encoder
) -> list[str]:
    """Greedy replies in the order of the prompts; prompts of like length run together."""
    replies = [""] * len(prompts)
    for part in _together([len(prompt) + max_new_tokens for prompt in prompts]):
        made = engine.generate([prompts[i] for i in part], max_new_tokens, encoder.stops)
        for i, generation in zip(part, made, strict=True):
            replies[i] = encoder.decode(generation.ids)
    return replies


def _together(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of the prompts that run as one batch, padded to the longest, shortest first."""
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        full = len(part) == GENERATED_TOGETHER or (len(part) + 1) * lengths[i] > GENERATED_TOKENS
        if part and full:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _is_text_right(reply: str, item: Item) -> bool:
    return reply.strip() == item.answer.strip()


def _is_json_right(reply: str, item: Item) -> bool:
    """Whether the reply parses, fits the item's schema and has the right value."""
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):  # no JSON, endless digits, endless brackets
        return False
    if item.schema is not None:
        try:
            jsonschema.validate(value, item.schema)
        except jsonschema.ValidationError:
            return False
    # As canonical text, because Python holds 1, 1.0 and True for equal.
    return _canonical(value) == _canonical(json.loads(item.answer))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def logprobs(questions: Sequence[_Question], engine: Engine) -> Iterator[list[float]]:
    """Summed log-probability of every continuation, for each question in order.

    Neighbours of one document share the beginning of their prompts, which is prefilled once.
    """
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
    questions: Sequence[_Question], prefix: tuple[int, ...], engine: Engine
) -> Iterator[list[float]]:
    sequences: list[tuple[int, ...]] = []
    keep: list[int] = []
    for question in questions:
        for continuation in _asked(question):
            sequences.append((*question.prompt[len(prefix) :], *continuation))
            keep.append(len(continuation))
    rows = engine.score(sequences, keep, prefix)
    for question in questions:
        if _is_one_row(question):
            row = next(rows).logprobs[0]
            values = [float(row[ids[0]]) for ids in question.continuations]
        else:
            values = [_summed(next(rows).logprobs, ids) for ids in question.continuations]
        if not all(math.isfinite(value) for value in values):
            raise InvalidEngine(f"the engine computed NaN or infinity for `{question.item.id}`")
        yield values


def _asked(question: _Question) -> tuple[tuple[int, ...], ...]:
    return question.continuations[:1] if _is_one_row(question) else question.continuations


def _is_one_row(question: _Question) -> bool:
    """Whether one distribution answers it: all continuations are different single tokens."""
    firsts = {ids[0] for ids in question.continuations if len(ids) == 1}
    return len(firsts) == len(question.continuations)


def _summed(rows: Any, ids: Sequence[int]) -> float:
    return float(rows.double()[range(len(ids)), list(ids)].sum())


def summary(name: str, results: Sequence[Answered]) -> list[Measurement]:
    """Accuracy and mean answer log-probability of a slice, clustered by document."""
    clusters = clusters_of([(each.document, each.id) for each in results])
    right = [float(each.correct) for each in results]
    found = stats.mean(right, clusters)
    if clusters is None:
        interval: tuple[float, float] | None = stats.wilson(int(sum(right)), len(right))
    else:
        interval = stats.bootstrap_mean(right, clusters)
    low, high = interval or (None, None)
    graded = stats.mean([each.answer_logprob for each in results], clusters)
    return [
        _measured("accuracy", name, dataclasses.replace(found, low=low, high=high)),
        _measured("answer_logprob", name, graded),
    ]


def _measured(metric: str, name: str, found: stats.Estimate) -> Measurement:
    unit = METRICS[metric].unit
    return Measurement(
        metric, found.value, unit, name, found.stderr, found.n, found.low, found.high
    )


def line(result: Answered) -> Mapping[str, Any]:
    """A result as a line of `items.jsonl`."""
    return {
        "slice": result.slice,
        "id": result.id,
        "level": result.level,
        "document": result.document,
        "correct": result.correct,
        "answer_logprob": result.answer_logprob,
        "reply": result.reply,
    }
