"""Which tokens were measured through the quantized cache, and what that cache held."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from qgrid.contracts import InvalidEngine
from qgrid.runtimes import _kv_cache
from qgrid.runtimes import transformers as runtime
from qgrid.runtimes._kv_cache import Quantization
from qgrid.runtimes._kv_used import Used
from qgrid.runtimes._piecewise import PieceScorer
from qgrid.runtimes._scoring import Scorer
from qgrid.types import Cell, KvCache, Model
from tests.runtimes.passes import some_ids


@pytest.fixture
def engine(make_cell: Callable[..., Cell], tiny_random: Path) -> runtime.Transformers:
    """The random model with a cache of 2 bits."""
    plain = make_cell(model=Model("random", str(tiny_random), None, False, False))
    cell = replace(plain, kv_cache=KvCache("int2", 2))
    return runtime.load(tiny_random, cell, "float32")


@pytest.mark.parametrize("lead", [0, 5, 21])
def test_rows_that_the_cache_changed_are_counted(tiny_random: Path, lead: int) -> None:
    """Against the numbers: a row without quantized tokens before it is that of 16 bits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_random, dtype=torch.float64).eval()
    asked = Quantization("hqq", 2, 32, 16)
    used, rng = Used(asked), random.Random(lead)
    sequences = [some_ids(rng, length) for length in (3, 50, 9, 17, 8, 33)]
    prefix, keep = some_ids(rng, lead), [2, 49, 4, 16, 7, 5]
    found = PieceScorer(model, asked, 4096, 0, used).score(sequences, keep, prefix)
    plain = Scorer(model, 4096, True, 0).score(sequences, keep, prefix)
    apart = [(a.logprobs - b.logprobs).abs().amax(1) for a, b in zip(found, plain, strict=True)]
    changed = int((torch.cat(apart) > 1e-5).sum())
    assert used.rows == (sum(keep), changed)
    assert 0 < changed <= sum(keep)


def test_replies_are_counted_as_well(engine: runtime.Transformers) -> None:
    """Of a reply, all but the first token."""
    made = engine.generate([[40, 41, 42], [43]], 6)
    assert engine.kv_rows() == (12, 10)
    assert [len(each.ids) for each in made] == [6, 6]
    (check,) = [each for each in engine.checks() if each.name == "kv_cache"]
    assert check.ok
    assert check.actual == "tensors 8 of 2 bits (loading, generation)"
    list(engine.score([list(range(40, 140))], [99]))
    assert engine.kv_rows() == (12 + 99, 10 + 35)  # the first piece is 64 tokens
    assert engine.checks()[-1].actual == "tensors 12 of 2 bits (loading, generation, scoring)"
    engine.close()
    assert engine.kv_rows() == (111, 45)


@pytest.mark.parametrize(("held", "told"), [(None, "32 bits"), (8, "8 bits")])
@pytest.mark.parametrize("use", ["scoring", "generation"])
def test_caches_in_use_are_weighed(
    engine: runtime.Transformers,
    monkeypatch: pytest.MonkeyPatch,
    use: str,
    held: int | None,
    told: str,
) -> None:
    """The probe at the load had what was asked for, and what came after did not."""
    name = "for_scoring" if use == "scoring" else "for_decoding"
    made = getattr(_kv_cache, name)

    def wrong(model: Any, asked: Quantization) -> Any:
        return DynamicCache() if held is None else made(model, replace(asked, bits=held))

    monkeypatch.setattr(_kv_cache, name, wrong)
    monkeypatch.setattr(_kv_cache, "finish", lambda cache: None)  # that such a cache has not
    assert engine.checks()[-1].ok
    with pytest.raises(InvalidEngine, match=rf"`kv_cache`.* {told} \({use}\)"):
        if use == "scoring":
            list(engine.score([list(range(40, 240))], [3]))
        else:
            engine.generate([[40, 41, 42]], 4)
