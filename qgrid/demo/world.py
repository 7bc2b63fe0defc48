"""Facts that hold in every document: who lives where, works as what, keeps which animal."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import islice, product

from qgrid.demo.lexicon import CITIES, COLOURS, JOBS, NAMES, PETS, SURNAMES
from qgrid.demo.problems import LEVELS, Problem, Question, sampled_choices
from qgrid.demo.seeds import Split

WORLD_SEED = 20_240_601
PEOPLE_PER_TIER = (40, 60, 100, 200, 400)
TIER_WEIGHTS = (10.0, 8.0, 6.0, 4.0, 2.0)  # share of the mentions that a tier gets

RELATIONS: dict[str, tuple[str, ...]] = {
    "city": CITIES,
    "job": JOBS,
    "pet": PETS,
    "colour": COLOURS,
}
STATEMENTS = {
    "city": "{who} lives in {what}.",
    "job": "{who} works as a {what}.",
    "pet": "{who} keeps a {what}.",
    "colour": "{who} likes the colour {what}.",
}
PHRASINGS = (
    "The {relation} of {who}",
    "What is the {relation} of {who}",
    "Tell me the {relation} of {who}",
    "Name the {relation} of {who}",
    "Which {relation} belongs to {who}",
)


@dataclass(frozen=True)
class Fact:
    """`who` has `what` as `relation`; tier 1 is mentioned most often, tier 5 least."""

    who: str
    relation: str
    what: str
    tier: int


@cache
def facts() -> tuple[tuple[Fact, ...], ...]:
    """All facts, by tier (index 0 is tier 1), the same in every run."""
    rng = random.Random(WORLD_SEED)
    pairs = iter(rng.sample(list(product(NAMES, SURNAMES)), sum(PEOPLE_PER_TIER)))
    tiers = []
    for tier, people in zip(LEVELS, PEOPLE_PER_TIER, strict=True):
        whos = [" ".join(pair) for pair in islice(pairs, people)]
        tiers.append(tuple(_fact(rng, who, tier, r) for who in whos for r in RELATIONS))
    return tuple(tiers)


def _fact(rng: random.Random, who: str, tier: int, relation: str) -> Fact:
    return Fact(who, relation, rng.choice(RELATIONS[relation]), tier)


def random_fact(rng: random.Random) -> Fact:
    """A fact, likelier from the well-known tiers."""
    return rng.choice(rng.choices(facts(), TIER_WEIGHTS)[0])


def statement(fact: Fact) -> str:
    """The sentence that states a fact."""
    return STATEMENTS[fact.relation].format(who=fact.who, what=fact.what)


def ask(rng: random.Random, fact: Fact, phrasing: str) -> Question:
    """A question about a fact, with wrong answers of the same kind."""
    prompt = phrasing.format(relation=fact.relation, who=fact.who)
    choices = sampled_choices(rng, fact.what, (), RELATIONS[fact.relation])
    return Question(prompt, fact.what, choices)


def knowledge(rng: random.Random, level: int, split: Split) -> Problem:
    """A question about a fact of a tier; pairs of fact and phrasing are split by content."""
    fact = rng.choice(facts()[level - 1])
    return Problem(level, (ask(rng, fact, rng.choice(PHRASINGS)),))
