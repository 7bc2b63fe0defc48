"""Items in a few characters each: what differs is counted as a plain comparison counts it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qgrid.reproduction import answers
from qgrid.reproduction.lock import Answers


def lines(n: int, seed: int = 0) -> list[dict[str, object]]:
    chance = random.Random(seed)
    return [
        {
            "slice": "code",
            "id": f"code-{i}",
            "level": i % 3,
            "document": None,
            "correct": chance.random() < 0.5,
            "answer_logprob": -chance.random(),
            "reply": chance.choice(['x"correct": true', "yes", "né"]),
        }
        for i in range(n)
    ]


def compact(items: list[dict[str, object]]) -> Answers:
    return answers.compact(json.dumps(item).encode() for item in items)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 100, 257])
def test_items_that_differ_are_counted(n: int) -> None:
    first = lines(n)
    chance = random.Random(n)
    second = [dict(item) for item in first]
    changed = chance.sample(range(n), max(1, n // 3))
    for place in changed:
        if chance.random() < 0.5:
            second[place]["correct"] = not second[place]["correct"]
        else:
            second[place]["answer_logprob"] = -2.0
    flipped = sum(a["correct"] != b["correct"] for a, b in zip(first, second, strict=True))

    assert answers.differing(compact(first), compact(second)) == (len(changed), flipped)
    assert answers.differing(compact(first), compact(first)) == (0, 0)
    assert len(compact(first).items) == 4 * n
    assert compact(first).digest != compact(second).digest


def test_items_of_one_side_only_differ() -> None:
    assert answers.differing(compact(lines(10)), compact(lines(7))) == (3, 3)


def test_being_right_is_the_item_s_own_word_and_not_its_text() -> None:
    wrong = {"slice": "s", "id": "1", "correct": False, "reply": '"correct": true'}
    assert int(compact([wrong]).right, 16) == 0
    assert int(compact([wrong, wrong | {"correct": True}]).right, 16) == 1


def test_two_lines_of_equal_marks_still_differ_as_a_whole() -> None:
    known = compact(lines(3))
    other = Answers(known.n, "0" * 16, known.right, known.items)
    assert answers.differing(known, other) == (1, 0)


def test_a_file_is_read_by_slices_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    both = [*lines(5), *({**item, "slice": 'a "b", "id": c'} for item in lines(4, seed=1))]
    file.write_text("".join(f"{json.dumps(item)}\n" for item in both))
    found = answers.read(file)
    assert {name: each.n for name, each in found.items()} == {"code": 5, 'a "b", "id": c': 4}
    assert found["code"] == compact(lines(5))


@pytest.mark.parametrize("text", ["{", '{"id": "x"}\n', "\n"])
def test_a_torn_file_has_no_answers(tmp_path: Path, text: str) -> None:
    (tmp_path / "items.jsonl").write_text(text)
    assert answers.read(tmp_path / "items.jsonl") == {}
    assert answers.read(tmp_path / "gone.jsonl") == {}
