"""Answers of `/completions` as rows and ids; what cannot be used is a `RequestFailed`. Pure.

Formats: vLLM's OpenAI server (`return_tokens_as_token_ids`, `return_token_ids`), the legacy
completions of https://platform.openai.com/docs/api-reference/completions, llama.cpp's server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qgrid.serving.failures import RequestFailed

Answer = Mapping[str, Any]
_NAMED = "token_id:"
_MOST_ID = 2**31  # above it is no token


@dataclass(frozen=True)
class Row:
    """The last tokens of a text: the likeliest `(rows, k)`, and what stands there `(rows,)`."""

    ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float64]
    chosen: npt.NDArray[np.float64]


def choice(answer: Answer) -> Mapping[str, Any]:
    """The one choice of an answer.

    Raises:
        RequestFailed: there is none.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise _garbage("no single choice in the answer")
    return choices[0]


def prompt_tokens(answer: Answer) -> int | None:
    """How many tokens of prompt the server counted; None: it does not say."""
    usage = answer.get("usage")
    found = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return found if isinstance(found, int) else None


def echoed(answer: Answer, ids: Sequence[int], keep: int) -> Row:
    """Log-probabilities of the last `keep` of the prompt's `ids`.

    Raises:
        RequestFailed: the answer is about other tokens, or lacks some.
    """
    told = choice(answer).get("logprobs")
    values = told.get("token_logprobs") if isinstance(told, Mapping) else None
    if not isinstance(told, Mapping) or not isinstance(values, list):
        raise _garbage("no log-probabilities of the prompt in the answer")
    _require_length(answer, len(values), len(ids))
    _require_same(told.get("tokens"), ids)
    wanted = slice(len(ids) - keep, len(ids))
    chosen = [_number(value) for value in values[wanted]]
    lists = told.get("top_logprobs")
    tops = lists[wanted] if isinstance(lists, list) else []
    ranked = [_ranked(each) for each in tops] if len(tops) == keep else []
    k = min((len(each) for each in ranked), default=0)
    listed = [each[:k] for each in ranked] if k else []
    likeliest = np.array(listed).reshape(keep, k, 2)
    return Row(likeliest[:, :, 0].astype(np.int64), likeliest[:, :, 1], np.array(chosen))


def without_lists(row: Row) -> Row:
    """The row with its chosen tokens alone."""
    empty = len(row.chosen)
    return Row(np.zeros((empty, 0), np.int64), np.zeros((empty, 0)), row.chosen)


def generated(answer: Answer, encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    """New token ids: as the server names them, else what its text encodes to.

    Raises:
        RequestFailed: there is no text.
    """
    made = choice(answer)
    for found in (_ids(made.get("token_ids")), content_ids(made.get("logprobs"))):
        if found is not None:
            return found
    text = made.get("text")
    if not isinstance(text, str):
        raise _garbage("no text in the answer")
    return tuple(encode(text))


def content_ids(told: Any) -> tuple[int, ...] | None:
    """llama.cpp tells the ids of generated tokens with their log-probabilities."""
    content = told.get("content") if isinstance(told, Mapping) else None
    if not isinstance(content, list) or not content:
        return None
    return _ids([each.get("id") if isinstance(each, Mapping) else None for each in content])


def _ids(found: Any) -> tuple[int, ...] | None:
    """A list of token ids; None: it is none."""
    if not isinstance(found, list) or not all(type(each) is int for each in found):
        return None
    return tuple(found) if all(0 <= each < _MOST_ID for each in found) else None


def _require_length(answer: Answer, told: int, sent: int) -> None:
    """A server that was asked for 0 or 1 new tokens tells about as many more than were sent."""
    counted = prompt_tokens(answer)
    if told not in {sent, sent + 1} or counted not in {None, sent}:
        raise _garbage(
            f"{sent} tokens were sent, but the answer tells of {told}, counted {counted}"
        )


def _require_same(names: Any, ids: Sequence[int]) -> None:
    """Where the server names tokens by id, they are those that were sent."""
    if not isinstance(names, list) or not all(_is_named(name) for name in names[: len(ids)]):
        return
    if [int(name.removeprefix(_NAMED)) for name in names[: len(ids)]] != list(ids):
        raise _garbage("the answer tells of other tokens than were sent")


def _ranked(found: Any) -> list[tuple[int, float]]:
    """Likeliest first; nothing where tokens are named by a text, which several tokens may share."""
    if not isinstance(found, Mapping) or not all(_is_named(name) for name in found):
        return []
    pairs = [(int(name.removeprefix(_NAMED)), _number(value)) for name, value in found.items()]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def _is_named(name: Any) -> bool:
    if not isinstance(name, str) or not name.startswith(_NAMED):
        return False
    digits = name.removeprefix(_NAMED)
    return digits.isdecimal() and len(digits) < 10


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise _garbage(f"{value!r} in the place of a log-probability")
    return float(value)


def _garbage(what: str) -> RequestFailed:
    return RequestFailed("garbage", what)
