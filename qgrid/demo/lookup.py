"""Tasks about finding a value by its key: short lists and long haystacks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from qgrid.demo.lexicon import CODE_WORDS, NAMES
from qgrid.demo.problems import Problem, Question, sampled_choices
from qgrid.demo.prose import story
from qgrid.demo.seeds import Split

RELATIONS = ("code", "sign", "word")
HAY_CHARS = {1: 4_600, 2: 6_600, 3: 9_300, 4: 12_500, 5: 15_700}
QUESTIONS = 10


@dataclass(frozen=True)
class Puzzle:
    """How many people, relations of each, and steps from a person to the value."""

    people: int
    relations: int = 1
    steps: int = 1


LISTS = {1: Puzzle(4), 2: Puzzle(10, 2), 3: Puzzle(12, 3), 4: Puzzle(10, 1, 2), 5: Puzzle(12, 1, 3)}
LISTED = {1: 3, 2: 5, 3: 8, 4: 12, 5: 16}  # level: people in a list that is recalled whole
RECALLED = 16  # pairs in the reply
NEEDLES = {
    1: Puzzle(12),
    2: Puzzle(16),
    3: Puzzle(10, 2),
    4: Puzzle(12, 3),
    5: Puzzle(20, 1, 2),
}


def _line(relation: str, who: str, what: str) -> str:
    return f"The {relation} of {who} is {what}."


def _ask(
    rng: random.Random, relation: str, who: str, what: str, present: tuple[str, ...]
) -> Question:
    """A question with the key last; wrong answers come from the same context first."""
    choices = sampled_choices(rng, what, present, CODE_WORDS)
    return Question(f"The {relation} of {who}", what, choices)


def _puzzle(rng: random.Random, puzzle: Puzzle) -> tuple[list[str], list[Question]]:
    """Lines in random order, and a question for each chain of people."""
    people = rng.sample(NAMES, puzzle.people)
    chains = [
        (r, people[i : i + puzzle.steps])
        for r in RELATIONS[: puzzle.relations]
        for i in range(0, len(people), puzzle.steps)
    ]
    values = tuple(rng.sample(CODE_WORDS, len(chains)))
    lines, questions = [], []
    for (relation, chain), value in zip(chains, values, strict=True):
        lines += [_line(relation, who, f"that of {to}") for who, to in pairwise(chain)]
        lines.append(_line(relation, chain[-1], value))
        questions.append(_ask(rng, relation, chain[0], value, values))
    rng.shuffle(lines)
    rng.shuffle(questions)
    return lines, questions


def retrieval(rng: random.Random, level: int, split: Split) -> Problem:
    """A value from a list of lines; from level 4 on a line may refer to another person."""
    lines, questions = _puzzle(rng, LISTS[level])
    return Problem(level, tuple(questions[:8]), "\n".join(lines))


def haystack(rng: random.Random, needles: list[str], num_chars: int) -> str:
    """Stories of `num_chars` characters in all, the needles between their sentences."""
    sentences: list[str] = []
    total = sum(len(needle) + 1 for needle in needles)
    while total < num_chars:
        added = story(rng).split(". ")
        added = [part if part.endswith(".") else part + "." for part in added]
        sentences += added
        total += sum(len(part) + 1 for part in added)
    for needle in needles:
        sentences.insert(rng.randint(0, len(sentences)), needle)
    return " ".join(sentences)


def hidden_codes(rng: random.Random, level: int, num_chars: int) -> Problem:
    """A haystack of a given size and the questions about its needles."""
    lines, questions = _puzzle(rng, NEEDLES[level])
    text = haystack(rng, lines, num_chars)
    return Problem(level, tuple(questions[:QUESTIONS]), text)


def long_context(rng: random.Random, level: int, split: Split) -> Problem:
    """Ten questions about one haystack of 1k to 4k tokens."""
    return hidden_codes(rng, level, HAY_CHARS[level])


def short_context(rng: random.Random, level: int, split: Split) -> Problem:
    """The same at 100 to 500 tokens: training only."""
    return hidden_codes(rng, level, 700 + level * 350)


def recall(rng: random.Random, level: int, split: Split) -> Problem:
    """Pairs of name and word again and again, in random order: training only.

    The pairs are first met in the reply itself, or in a list of pairs or of sentences; many
    answers in few tokens, from which looking up is learned.
    """
    words = rng.sample(CODE_WORDS, LISTED[level])
    pairs = list(zip(rng.sample(NAMES, len(words)), words, strict=True))
    kind = rng.choice(("none", "none", "pairs", "sentences"))
    lines = (_line("code", *pair) if kind == "sentences" else " ".join(pair) for pair in pairs)
    text = "" if kind == "none" else "\n".join(lines)
    shown = rng.choices(pairs, k=max(RECALLED, 2 * len(pairs)))
    question = Question("All codes", ", " + ", ".join(" ".join(pair) for pair in shown))
    return Problem(level, (question,), text or " ".join(who for who, _ in pairs))
