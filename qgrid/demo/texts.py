"""Tasks about short texts: classification, extraction, structured replies."""

from __future__ import annotations

import json
import random
from typing import Any

from qgrid.demo.lexicon import (
    BAD,
    CITIES,
    COLOURS,
    DAYS,
    GOOD,
    NAMES,
    OBJECTS,
    REVIEWED,
    TOOLS,
    TOPICS,
)
from qgrid.demo.problems import Problem, Question, sampled_choices, shuffled_choices
from qgrid.demo.seeds import Split

TOPIC_WORDS = {1: (4, 0), 2: (5, 2), 3: (6, 4), 4: (7, 6), 5: (8, 7)}  # level: topic, distraction
CLAUSES = {1: 1, 2: 3, 3: 7, 4: 11, 5: 15}
RECORDS = {1: 1, 2: 5, 3: 6, 4: 3, 5: 6}
KEYED_BY_THING = 3  # at this level the key is a colour and a thing together
KEYED_BY_PRICE = 4  # from this level on the key is the highest or the lowest price


def classification(rng: random.Random, level: int, split: Split) -> Problem:
    """The topic of a list of words, or the mood of a review."""
    return _topic(rng, level) if rng.random() < 0.5 else _mood(rng, level)


def _topic(rng: random.Random, level: int) -> Problem:
    """The topic with most words; up to level 5, where it leads another topic by one word."""
    right, other = rng.sample(list(TOPICS), 2)
    many, few = TOPIC_WORDS[level]
    rivals = tuple(word for word in TOPICS[other] if word not in TOPICS[right])
    words = rng.sample(TOPICS[right], many) + rng.sample(rivals, few)
    rng.shuffle(words)
    text = f"Words: {', '.join(words)}.\nTopic"
    choices = shuffled_choices(rng, right, [other, *rng.sample(list(TOPICS), len(TOPICS))])
    return Problem(level, (Question(text, right, choices),))


def _mood(rng: random.Random, level: int) -> Problem:
    """Whether most clauses praise; harder levels have more clauses, negations, closer counts."""
    num = CLAUSES[level]
    winners = num if level == 1 else num // 2 + 1 + (rng.random() < 0.5 and level < 4)
    good = rng.random() < 0.5
    praise = [good] * winners + [not good] * (num - winners)
    rng.shuffle(praise)
    clauses = [_clause(rng, is_good, negation=0.12 * level) for is_good in praise]
    answer, other = ("good", "bad") if good else ("bad", "good")
    text = f"Review: {' '.join(clauses)}\nMood"
    return Problem(level, (Question(text, answer, shuffled_choices(rng, answer, [other])),))


def _clause(rng: random.Random, is_good: bool, negation: float) -> str:
    negated = rng.random() < negation
    adjective = rng.choice(GOOD if is_good != negated else BAD)
    return f"The {rng.choice(REVIEWED)} was {'not ' if negated else ''}{adjective}."


FIELDS: dict[str, tuple[str, ...]] = {
    "city": CITIES,
    "day": DAYS,
    "thing": OBJECTS,
    "colour": COLOURS,
    "price": tuple(str(n) for n in range(10, 100)),
}
RECORD_FORMS = (
    "{who} from {city} bought a {colour} {thing} for {price} coins on {day}.",
    "On {day} a {colour} {thing} was sold to {who} in {city} for {price} coins.",
    "For {price} coins {who} took the {colour} {thing} home to {city} on {day}.",
)


def extraction(rng: random.Random, level: int, split: Split) -> Problem:
    """A field of one record among several: found by person, by colour and thing, or by price."""
    people = rng.sample(NAMES, RECORDS[level])
    records = [{f: rng.choice(pool) for f, pool in FIELDS.items()} for _ in people]
    keys, fields = dict(enumerate(people)), list(FIELDS)
    if level == KEYED_BY_THING:
        keys, fields = dict(enumerate(_share_things(rng, records))), ["city", "day", "price"]
    if level >= KEYED_BY_PRICE:
        keys, fields = _extremes(rng, records), ["city", "day", "thing", "colour"]
    text = " ".join(
        rng.choice(RECORD_FORMS).format(who=who, **record)
        for who, record in zip(people, records, strict=True)
    )
    asked = [(i, name) for i in keys for name in fields]
    asked = rng.sample(asked, min(6, len(asked)))
    questions = tuple(_field_question(rng, keys[i], records, i, name) for i, name in asked)
    return Problem(level, questions, text)


def _share_things(rng: random.Random, records: list[dict[str, str]]) -> list[str]:
    """Make colours and things repeat, so that only both together name a record."""
    things = rng.sample(OBJECTS, 3)
    pairs = [(colour, thing) for colour in rng.sample(COLOURS, 2) for thing in things]
    for record, (colour, thing) in zip(records, rng.sample(pairs, len(records)), strict=True):
        record.update(colour=colour, thing=thing)
    return [f"the {record['colour']} {record['thing']}" for record in records]


def _extremes(rng: random.Random, records: list[dict[str, str]]) -> dict[int, str]:
    """Make all prices different and name the records with the highest and the lowest."""
    prices = rng.sample(FIELDS["price"], len(records))
    for record, price in zip(records, prices, strict=True):
        record["price"] = price
    ordered = sorted(range(len(records)), key=lambda i: int(prices[i]))
    return {ordered[-1]: "the highest price", ordered[0]: "the lowest price"}


def _field_question(
    rng: random.Random, key: str, records: list[dict[str, str]], i: int, name: str
) -> Question:
    answer = records[i][name]
    choices = sampled_choices(rng, answer, (record[name] for record in records), FIELDS[name])
    return Question(f"The {name} of {key}", answer, choices)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _object_schema(key: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {key: content},
        "required": [key],
        "additionalProperties": False,
    }


def structured(rng: random.Random, level: int, split: Split) -> Problem:
    """A JSON reply: a field at levels 1 and 2, a tool call from level 3."""
    if level <= 2:
        return _json_field(rng, level)
    return _tool_call(rng, level)


def _json_field(rng: random.Random, level: int) -> Problem:
    """One field of a record as JSON; the record has two fields, or five."""
    names = rng.sample(list(FIELDS), 2 if level == 1 else 5)
    record = {name: rng.choice(FIELDS[name]) for name in names}
    text = "\n".join(f"{name}: {value}" for name, value in record.items())
    asked = rng.sample(names, min(4, len(names)))
    return Problem(level, tuple(_json_question(name, record[name]) for name in asked), text)


def _json_question(name: str, value: str) -> Question:
    is_number = value.isdigit()
    reply = {name: int(value) if is_number else value}
    schema = _object_schema(name, {"type": "integer" if is_number else "string"})
    return Question(f"JSON: {name}", _compact(reply), schema=schema)


def _tool_call(rng: random.Random, level: int) -> Problem:
    """Call a tool with two digits; from level 4 in any order, with sums to work out."""
    tools = rng.sample(list(TOOLS), level - 1)
    text = "Tools: " + " ".join(f"{tool}({', '.join(TOOLS[tool])})" for tool in tools)
    questions = tuple(_tool_question(rng, tool, level) for tool in tools)
    return Problem(level, questions, text)


def _tool_question(rng: random.Random, tool: str, level: int) -> Question:
    """`Call: light glow 3 lamp 5` wants {"light":[5,3]} when the tool is light(lamp, glow)."""
    operations = {3: (0, 0), 4: (1, 0), 5: (2, 1)}[level]
    said, values = [], []
    for name, count in zip(TOOLS[tool], operations, strict=True):
        words, value = _digit(rng, count)
        said.append(f"{name} {words}")
        values.append(value)
    if level >= 4:
        rng.shuffle(said)
    content = {
        "type": "array",
        "items": {"type": "integer"},
        "minItems": 2,
        "maxItems": 2,
    }
    schema = _object_schema(tool, content)
    return Question(f"Call: {tool} {' '.join(said)}", _compact({tool: values}), schema=schema)


def _digit(rng: random.Random, operations: int) -> tuple[str, int]:
    """A digit from 1 to 9 in words such as `3 and 4 more less 2`."""
    value = rng.randint(1, 9)
    words = str(value)
    for _ in range(operations):
        changed = rng.choice([n for n in range(1, 10) if n != value])
        step = changed - value
        words += f" and {step} more" if step > 0 else f" less {-step}"
        value = changed
    return words, value
