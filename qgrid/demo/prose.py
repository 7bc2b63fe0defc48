"""Short stories about the generated world, for language modelling and as haystacks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from qgrid.demo import world
from qgrid.demo.lexicon import CITIES, COLOURS, DAYS, FOODS, NAMES, OBJECTS, PETS, PLACES

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
WEATHER = ("rain", "snow", "wind", "fog", "sunshine", "frost")
MOODS = ("happy", "tired", "angry", "proud", "calm", "hungry")


@dataclass(frozen=True)
class Cast:
    """What stays the same within one story."""

    hero: str
    friend: str
    city: str
    thing: str
    colour: str
    pet: str
    place: str
    price: int


def cast(rng: random.Random) -> Cast:
    """Draw the characters and things of a story."""
    hero, friend = rng.sample(NAMES, 2)
    return Cast(
        hero,
        friend,
        rng.choice(CITIES),
        rng.choice(OBJECTS),
        rng.choice(COLOURS),
        rng.choice(PETS),
        rng.choice(PLACES),
        rng.randint(2, 60),
    )


OPENINGS = (
    "On {day} {hero} came to {city} with a {pet}.",
    "{hero} and {friend} met in {city} on {day}.",
    "In the morning {hero} left the {place} of {city}.",
    "There was {weather} in {city} when {hero} arrived at the {place}.",
)
MIDDLES = (
    "{hero} wanted to buy a {colour} {thing} for {friend}.",
    "The {colour} {thing} cost {price} coins.",
    "{friend} was {mood} and waited near the {place2}.",
    "The {pet} of {hero} slept under the {thing2}.",
    "They ate {food} with {food2} at the {place}.",
    "{hero} gave {number} {food}s to {friend}.",
    "{friend} asked {hero} about the {thing}.",
    '"I lost the {colour} {thing}", said {friend}.',
    '"Where is the {pet}?" asked {hero}.',
    "After {number} hours the {weather} stopped.",
    "{hero} put the {thing} behind the {thing2}.",
    "{friend} walked from the {place} to the {place2} with {other}.",
    "{other} sold a {colour2} {thing2} for {price2} coins.",
    "The road from {city} to {city2} was closed because of the {weather}.",
)
ENDINGS = (
    "At night {hero} found the {colour} {thing} in the {place}.",
    "{hero} paid {price} coins for the {thing} and went back to {city}.",
    "In the end {friend} was {mood}, and {hero} took the {pet} home.",
    "{hero} and {friend} left {city} on {day}.",
)


def _sentence(rng: random.Random, template: str, players: Cast) -> str:
    """Fill a template with the story's cast and fresh words."""
    return template.format(
        **vars(players),
        day=rng.choice(DAYS),
        weather=rng.choice(WEATHER),
        mood=rng.choice(MOODS),
        food=rng.choice(FOODS),
        food2=rng.choice(FOODS),
        number=rng.choice(NUMBERS),
        place2=rng.choice(PLACES),
        thing2=rng.choice(OBJECTS),
        city2=rng.choice(CITIES),
        colour2=rng.choice(COLOURS),
        other=rng.choice(NAMES),
        price2=rng.randint(2, 60),
    )


def story(rng: random.Random, with_facts: bool = True) -> str:
    """One paragraph of six to fourteen sentences; one in five states a fact of the world."""
    players = cast(rng)
    sentences = [_sentence(rng, rng.choice(OPENINGS), players)]
    for _ in range(rng.randint(4, 12)):
        if with_facts and rng.random() < 0.2:
            sentences.append(world.statement(world.random_fact(rng)))
        else:
            sentences.append(_sentence(rng, rng.choice(MIDDLES), players))
    sentences.append(_sentence(rng, rng.choice(ENDINGS), players))
    return " ".join(sentences)


def portrait(rng: random.Random) -> str:
    """A paragraph of plain facts, in the order of a random draw."""
    return " ".join(world.statement(world.random_fact(rng)) for _ in range(rng.randint(5, 10)))


def paragraphs(rng: random.Random) -> Iterator[str]:
    """Endless paragraphs of prose: two stories for each portrait."""
    while True:
        yield portrait(rng) if rng.random() < 1 / 3 else story(rng)


def prose(rng: random.Random, num_chars: int) -> str:
    """Paragraphs joined by blank lines, at least `num_chars` characters long."""
    parts: list[str] = []
    total = 0
    for paragraph in paragraphs(rng):
        parts.append(paragraph)
        total += len(paragraph) + 2
        if total >= num_chars:
            break
    return "\n\n".join(parts)
