"""Answers of servers as rows and ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qgrid.runtimes import _openai_rows as rows
from qgrid.serving.failures import RequestFailed


def answer(logprobs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "x", "logprobs": logprobs, **more}]}


def echo(ids: list[int], top: list[dict[str, float] | None] | None = None) -> dict[str, Any]:
    values: list[float | None] = [None, *(-0.5 * place for place in range(1, len(ids)))]
    names = [f"token_id:{token}" for token in ids]
    return answer({"tokens": names, "token_logprobs": values, "top_logprobs": top})


def test_rows_are_the_last_of_the_prompt_likeliest_first() -> None:
    top: list[dict[str, float] | None] = [
        None,
        {"token_id:7": -0.5, "token_id:1": -0.1, "token_id:2": -0.2},
        {"token_id:9": -1.0, "token_id:4": -0.3},
    ]
    found = rows.echoed(echo([5, 7, 9], top), [5, 7, 9], keep=2)
    assert found.chosen.tolist() == [-0.5, -1.0]
    assert found.ids.tolist() == [[1, 2], [4, 9]]  # as many as every row has
    assert found.logprobs.tolist() == [[-0.1, -0.2], [-0.3, -1.0]]
    longer = echo([5, 7, 9, 3], [*top, {"token_id:3": 0.0}])  # one new token beside the echo
    assert rows.echoed(longer, [5, 7, 9], keep=2).chosen.tolist() == [-0.5, -1.0]


def test_tokens_named_by_text_give_no_list() -> None:
    top: list[dict[str, float] | None] = [None, {" a": -0.5, "\ufffd": -0.1}]
    found = rows.echoed(echo([5, 7], top), [5, 7], keep=1)
    assert found.chosen.tolist() == [-0.5]
    assert found.ids.shape == (1, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"choices": []},
        {"choices": [1]},
        answer(None),
        answer({"token_logprobs": [None, -1.0]}),
        answer({"token_logprobs": [None, -1.0, None]}),
        answer({"token_logprobs": [None, -1.0, "-1"]}),
        answer({"token_logprobs": [None, -1.0, float("nan")]}),
        answer({"token_logprobs": [None, -1.0, -1.0, -1.0, -1.0]}),
        echo([5, 7, 8]),
        {**echo([5, 7, 9]), "usage": {"prompt_tokens": 4}},
    ],
)
def test_an_answer_about_something_else_is_garbage(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestFailed) as caught:
        rows.echoed(wrong, [5, 7, 9], keep=2)
    assert caught.value.kind == "garbage" and caught.value.retryable


def test_generated_ids_come_by_name_or_from_the_text() -> None:
    def encode(text: str) -> list[int]:
        return [ord(each) for each in text]

    assert rows.generated(answer(token_ids=[1, 2]), encode) == (1, 2)
    content = {"content": [{"id": 4, "token": "a"}, {"id": 5, "token": "b"}]}
    assert rows.generated(answer(content), encode) == (4, 5)
    assert rows.generated(answer(), encode) == (ord("x"),)
    for ids in ([-1], [2**40], [True], ["a"]):
        assert rows.generated(answer(token_ids=ids), encode) == (ord("x"),)
    for odd in (5, None, {"token": "a"}, {"id": "a"}):
        assert rows.content_ids({"content": [odd]}) is None
    with pytest.raises(RequestFailed, match="no text"):
        rows.generated({"choices": [{"text": None}]}, encode)


def test_rows_without_lists_keep_what_was_chosen() -> None:
    found = rows.without_lists(rows.Row(np.ones((2, 3), np.int64), np.ones((2, 3)), np.ones(2)))
    assert (found.ids.shape, found.logprobs.shape, found.chosen.tolist()) == (
        (2, 0),
        (2, 0),
        [1, 1],
    )
