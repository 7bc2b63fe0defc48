"""Items of a slice put to an engine: choices by log-probability, replies by text or JSON value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import jsonschema

from qgrid import stats
from qgrid.contracts import NoLogprobs
from qgrid.measure.compare import clusters_of
from qgrid.measure.continuations import NoAnswer, Question, logprobs
from qgrid.measure.truncated import require_answers
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
    answer_logprob: float | None  # nats, summed over the right answer's tokens; None: not told
    reply: str  # the chosen or generated text
    failed: str | None = None  # why a server gave no answer; the rest then says nothing


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
    name: str, questions: Sequence[Question], new_tokens: int, encoder: Encoder
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
        Question(item, tuple(prompt), tuple(tuple(encoder.text(c)) for c in item.choices))
        for item, prompt in zip(items, prompts, strict=True)
    ]
    _require_positions(name, questions, 0, encoder)
    scored = zip(items, logprobs(questions, engine), strict=True)
    return [_chosen(name, item, values) for item, values in scored]


def _failed(name: str, item: Item, reason: str) -> Answered:
    return Answered(name, item.id, item.level, item.document, False, None, "", reason)


def _chosen(name: str, item: Item, values: Sequence[float] | NoAnswer) -> Answered:
    if isinstance(values, NoAnswer):
        return _failed(name, item, values.reason)
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
        Question(item, tuple(prompt), (tuple(encoder.text(item.answer)),))
        for item, prompt in zip(items, prompts, strict=True)
    ]
    _require_positions(name, questions, wanted.max_new_tokens, encoder)
    replies = _generated(prompts, wanted.max_new_tokens, engine, encoder)
    right = _is_json_right if wanted.scoring == "json" else _is_text_right
    results = []
    for item, reply, value in zip(items, replies, _of_answers(questions, engine), strict=True):
        missing = next((part for part in (reply, value) if isinstance(part, NoAnswer)), None)
        if missing is not None:
            results.append(_failed(name, item, missing.reason))
            continue
        text, told = cast("str", reply), cast("float | None", value)
        place = (name, item.id, item.level, item.document)
        results.append(Answered(*place, right(text, item), told, text.strip()))
    return results


def _of_answers(questions: Sequence[Question], engine: Engine) -> list[float | NoAnswer | None]:
    """Log-probability of every right answer, None where the engine tells none."""
    try:
        found = list(logprobs(questions, engine))
    except NoLogprobs:
        return [None] * len(questions)
    return [values if isinstance(values, NoAnswer) else values[0] for values in found]


def _generated(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, engine: Engine, encoder: Encoder
) -> list[str | NoAnswer]:
    """Greedy replies in the order of the prompts; prompts of like length run together."""
    replies: list[str | NoAnswer] = [""] * len(prompts)
    for part in _together([len(prompt) + max_new_tokens for prompt in prompts]):
        made = engine.generate([prompts[i] for i in part], max_new_tokens, encoder.stops)
        for i, generation in zip(part, made, strict=True):
            error = generation.error
            replies[i] = encoder.decode(generation.ids) if error is None else NoAnswer(error)
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


def summary(name: str, every: Sequence[Answered]) -> list[Measurement]:
    """Accuracy and mean answer log-probability of a slice, clustered by document.

    Items without an answer are counted and kept out.

    Raises:
        TooManyFailed: so many that the others are not the same slice.
    """
    failed = [each.failed for each in every if each.failed is not None]
    require_answers(failed, len(every), f"items of slice `{name}`")
    results = [each for each in every if each.failed is None]
    clusters = clusters_of([(each.document, each.id) for each in results])
    right = [float(each.correct) for each in results]
    found = stats.mean(right, clusters)
    if clusters is None:
        interval: tuple[float, float] | None = stats.wilson(int(sum(right)), len(right))
    else:
        interval = stats.bootstrap_mean(right, clusters)
    low, high = interval or (None, None)
    measured = [_measured("accuracy", name, dataclasses.replace(found, low=low, high=high))]
    graded = [each.answer_logprob for each in results if each.answer_logprob is not None]
    if len(graded) == len(results):
        measured.append(_measured("answer_logprob", name, stats.mean(graded, clusters)))
    if failed:
        unit = METRICS["failed_items"].unit
        measured.append(Measurement("failed_items", len(failed), unit, name, n=len(every)))
    return measured


def _measured(metric: str, name: str, found: stats.Estimate) -> Measurement:
    unit = METRICS[metric].unit
    return Measurement(
        metric, found.value, unit, name, found.stderr, found.n, found.low, found.high
    )


def line(result: Answered) -> Mapping[str, Any]:
    """A result as a line of `items.jsonl`; `failed` is there only where an item got no answer."""
    told = {} if result.failed is None else {"failed": result.failed}
    return {
        "slice": result.slice,
        "id": result.id,
        "level": result.level,
        "document": result.document,
        "correct": result.correct,
        "answer_logprob": result.answer_logprob,
        "reply": result.reply,
        **told,
    }
