"""The generator repeats itself, and what is held out stays held out."""

from __future__ import annotations

import itertools
import random

import pytest

from qgrid.demo.problems import LEVELS, Problem, draw
from qgrid.demo.prose import prose
from qgrid.demo.seeds import Split, belongs, document_rng
from qgrid.demo.tasks import SLICES, TRAINED, conversation
from qgrid.demo.tokenizer import CORPUS_DOCUMENTS, CORPUS_SEED_START
from qgrid.demo.world import PEOPLE_PER_TIER, RELATIONS, facts

KINDS = list(itertools.product(TRAINED, LEVELS))


def one(task: str, level: int, index: int, split: Split = Split.TRAIN) -> Problem:
    return draw(TRAINED[task], document_rng(split, index), level, split)


@pytest.mark.parametrize(("task", "level"), KINDS)
def test_equal_seeds_give_equal_problems(task: str, level: int) -> None:
    assert one(task, level, 7) == one(task, level, 7)
    assert one(task, level, 7) != one(task, level, 8)


@pytest.mark.parametrize(("task", "level"), KINDS)
def test_choices_hold_the_answer_once(task: str, level: int) -> None:
    for index in range(20):
        for question in one(task, level, index).questions:
            if question.choices:
                assert question.choices.count(question.answer) == 1
                assert len(set(question.choices)) == len(question.choices) in (2, 4)
                pairs = itertools.permutations(question.choices, 2)
                assert not any(b.startswith(a) for a, b in pairs)


def test_prose_repeats_and_varies() -> None:
    assert prose(random.Random(1), 900) == prose(random.Random(1), 900)
    assert prose(random.Random(1), 900) != prose(random.Random(2), 900)


def test_seed_ranges_are_disjoint() -> None:
    for a, b in itertools.combinations(Split, 2):
        assert a.value.stop <= b.value.start or b.value.stop <= a.value.start
    assert len(Split.TRAIN.value) > CORPUS_SEED_START + CORPUS_DOCUMENTS


def test_a_seed_outside_its_range_is_refused() -> None:
    with pytest.raises(IndexError):
        document_rng(Split.TRAIN, 1 << 40)


def test_each_content_belongs_to_training_or_to_the_held_out() -> None:
    for number in range(1000):
        assert belongs(str(number), Split.TRAIN) != belongs(str(number), Split.HELD_OUT)
        assert belongs(str(number), Split.TRAIN) == belongs(str(number), Split.CALIBRATION)


@pytest.mark.parametrize("task", list(SLICES))
@pytest.mark.parametrize("split", list(Split))
def test_problems_come_from_the_contents_of_their_split(task: str, split: Split) -> None:
    for index in range(10):
        assert belongs(one(task, 1 + index % 5, index, split).content, split)


def test_every_fact_is_stated_once() -> None:
    for tier, people in zip(facts(), PEOPLE_PER_TIER, strict=True):
        assert len(tier) == people * len(RELATIONS)
    everyone = [fact.who for tier in facts() for fact in tier]
    assert len(set(everyone)) == sum(PEOPLE_PER_TIER)


def test_programs_print_what_the_answer_says(capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(50):
        question = one("code", 1 + index % 5, index).questions[0]
        exec(question.prompt, {})
        assert capsys.readouterr().out.strip() == question.answer


def test_sums_are_right() -> None:
    for index in range(50):
        question = one("arithmetic", 1 + index % 5, index).questions[0]
        assert str(eval(question.prompt.rstrip("="))) == question.answer


def test_a_conversation_asks_in_turns_and_gives_the_context_once() -> None:
    problem = one("retrieval", 1, 3)
    turns = conversation(problem)
    assert [role for role, _ in turns] == ["user", "assistant"] * len(problem.questions)
    assert turns[0][1] == problem.message(problem.questions[0])
    assert sum(problem.context in text for _, text in turns) == 1
