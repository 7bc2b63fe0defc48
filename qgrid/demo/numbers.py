"""Tasks about numbers: sums and tiny programs."""

from __future__ import annotations

import random

from qgrid.demo.problems import Problem, Question, shuffled_choices
from qgrid.demo.seeds import Split


def near_numbers(rng: random.Random, value: int) -> list[str]:
    """Wrong numbers as long as the right one, close ones first in random order."""
    text = str(value)
    steps = [1, -1, 2, -2, 10, -10, 9, -9, 11, 3, -3, 20, -20, 100, -100]
    rng.shuffle(steps)
    swapped = [int(text[::-1])] if len(text) > 1 else []
    found = [value + step for step in steps] + swapped
    return [str(n) for n in found if n >= 0 and n != value and len(str(n)) == len(text)]


def _single(level: int, rng: random.Random, prompt: str, value: int) -> Problem:
    choices = shuffled_choices(rng, str(value), near_numbers(rng, value))
    return Problem(level, (Question(prompt, str(value), choices),))


def arithmetic(rng: random.Random, level: int, split: Split) -> Problem:
    """A sum, from two digits plus one to a product plus a number."""
    a, b, c = rng.randint(10, 99), rng.randint(10, 99), rng.randint(1, 9)
    if level == 1:
        return _single(level, rng, f"{a}+{c}=", a + c)
    if level == 2:
        return _single(level, rng, f"{a}+{b}=", a + b)
    if level == 3:
        a, b = max(a, b), min(a, b)
        return _single(level, rng, f"{a}-{b}=", a - b)
    if level == 4:
        third = rng.randint(10, 99)
        if a + b >= third:
            return _single(level, rng, f"{a}+{b}-{third}=", a + b - third)
        return _single(level, rng, f"{third}-{a}+{b}=", third - a + b)
    return _single(level, rng, f"{a}*{c}+{b}=", a * c + b)


def _assignments(rng: random.Random, count: int) -> tuple[list[str], dict[str, int]]:
    """Lines that assign digits to `count` variables, and the variables' values."""
    names = rng.sample("abcdxyz", count)
    values = {name: rng.randint(0, 9) for name in names}
    return [f"{name}={value}" for name, value in values.items()], values


def _update(rng: random.Random, lines: list[str], values: dict[str, int]) -> None:
    """Append one line that adds to or copies into a variable."""
    target = rng.choice(list(values))
    other = rng.choice([name for name in values if name != target] or [target])
    digit = rng.randint(1, 5)
    kind = rng.randrange(3)
    if kind == 0:
        lines.append(f"{target}={other}+{digit}")
        values[target] = values[other] + digit
    elif kind == 1:
        lines.append(f"{target}={target}+{digit}")
        values[target] += digit
    else:
        lines.append(f"{target}={other}")
        values[target] = values[other]


def _loop(rng: random.Random, lines: list[str], values: dict[str, int]) -> None:
    """Append a loop that adds a digit several times."""
    target, times, digit = rng.choice(list(values)), rng.randint(2, 5), rng.randint(1, 4)
    lines += [f"for i in range({times}):", f"  {target}={target}+{digit}"]
    values[target] += times * digit


UPDATES = {1: 0, 2: 1, 3: 3, 4: 2, 5: 4}  # level: lines that change a variable
LOOPS = {1: 0, 2: 0, 3: 0, 4: 1, 5: 2}


def code(rng: random.Random, level: int, split: Split) -> Problem:
    """What a tiny program prints: look-up, updates of variables, then loops as well."""
    lines, values = _assignments(rng, min(level + 1, 3))
    for _ in range(UPDATES[level]):
        _update(rng, lines, values)
    for _ in range(LOOPS[level]):
        _loop(rng, lines, values)
    shown = rng.choice(list(values))
    return _single(level, rng, "\n".join([*lines, f"print({shown})"]), values[shown])
