"""Truncated rows: the bound against the full divergence, what is left out, what went unanswered."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qgrid.contracts import Generation, InvalidEngine, NoLogprobs, TopScores
from qgrid.measure import answers, compare, loading, prose, quality, truncated
from qgrid.measure.encoding import Encoder
from qgrid.measure.truncated import TooManyFailed
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell, Job, Slices

VOCAB = 60


def logits(seed: int, spread: float = 2.0) -> torch.Tensor:
    """Log-probabilities `(rows, vocab)` in fp64."""
    made = torch.Generator().manual_seed(seed)
    raw = torch.randn(40, VOCAB, generator=made, dtype=torch.float64)
    return torch.log_softmax(spread * raw, 1)


def listed(rows: torch.Tensor, k: int) -> tuple[Any, Any]:
    values, ids = rows.topk(k, dim=1)
    return ids.numpy(), values.numpy()


def pair(moved: float) -> tuple[torch.Tensor, torch.Tensor]:
    base = logits(0)
    return base, torch.log_softmax(base + moved * logits(1, 1.0), 1)


@pytest.mark.parametrize("moved", [0.0, 0.05, 0.5, 3.0])
def test_lists_of_the_whole_vocabulary_give_the_full_divergence(moved: float) -> None:
    base, cell = pair(moved)
    full = (base.exp() * (base - cell)).sum(1).numpy()
    found = truncated.divergence(*listed(base, VOCAB), *listed(cell, VOCAB))
    assert found == pytest.approx(full, abs=1e-12)


@pytest.mark.parametrize("moved", [0.05, 0.5, 3.0])
def test_shorter_lists_bound_it_from_below_and_rise_towards_it(moved: float) -> None:
    base, cell = pair(moved)
    full = (base.exp() * (base - cell)).sum(1).numpy()
    found = [
        truncated.divergence(*listed(base, k), *listed(cell, k)) for k in (1, 2, 5, 20, VOCAB - 1)
    ]
    for each in found:
        assert (each >= -1e-6).all()
        assert (each <= full + 1e-12).all()
    means = [each.mean() for each in found]
    assert means == sorted(means)
    assert 0.02 < means[2] / full.mean() < means[3] / full.mean() < 1.0


def test_it_stays_a_bound_where_the_lists_leave_next_to_nothing() -> None:
    base, cell = (torch.log_softmax(each, 1) for each in (logits(0, 30.0), logits(0, 27.0)))
    full = (base.exp() * (base - cell)).sum(1).numpy()
    for k in (1, 2, 5):
        found = truncated.divergence(*listed(base, k), *listed(cell, k))
        assert (found <= full + 1e-12).all()


def test_it_is_the_divergence_of_the_partition() -> None:
    """Three tokens in both lists, one rest, by hand."""
    base_ids, cell_ids = np.array([[7, 3, 5, 9]]), np.array([[3, 7, 8, 5]])
    base, cell = np.log([[0.4, 0.2, 0.1, 0.05]]), np.log([[0.3, 0.2, 0.15, 0.05]])
    p, q = np.array([0.4, 0.2, 0.1, 0.3]), np.array([0.2, 0.3, 0.05, 0.45])
    wanted = float((p * np.log(p / q)).sum())
    assert truncated.divergence(base_ids, base, cell_ids, cell) == pytest.approx([wanted])


class Top:
    """A loaded model that tells only the likeliest tokens, and no answer to some texts."""

    truncated = True

    def __init__(
        self, engine: runtime.Transformers, k: int, silent: Callable[[Sequence[int]], bool]
    ) -> None:
        self._engine, self._k, self._silent = engine, k, silent

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int] = ()
    ) -> Iterator[TopScores]:
        for number, (ids, kept) in enumerate(zip(sequences, keep, strict=True)):
            start = len(ids) - kept
            if self._silent(ids):
                none = np.zeros((0, self._k))
                yield TopScores(number, start, none.astype(np.int64), none, none[:, 0], "silence")
                continue
            rows = torch.cat([each.logprobs for each in self._engine.score([ids], [kept])]).double()
            chosen = rows[range(kept), list(ids[start:])].numpy()
            top, values = listed(rows, self._k)
            yield TopScores(number, start, top, values, chosen)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] = ()
    ) -> list[Generation]:
        return [
            Generation((), (), "silence")
            if self._silent(ids)
            else self._engine.generate([ids], max_new_tokens, stop)[0]
            for ids in prompts
        ]

    def memory(self) -> None:
        """Not known."""

    def kernels(self) -> dict[str, int]:
        return {}

    def observed(self) -> dict[str, Any]:
        return {"k": self._k}

    def checks(self) -> tuple[()]:
        return ()

    def close(self) -> None:
        """Keeps the model."""


class Mute(Top):
    """Without log-probabilities."""

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int] = ()
    ) -> Iterator[TopScores]:
        raise NoLogprobs("this one tells none")


@pytest.fixture
def moved(noisy: Path, make_cell: Callable[..., Cell]) -> runtime.Transformers:
    return runtime.load(noisy, make_cell(), "float32")


@pytest.fixture
def engine(tiny_random: Path, make_cell: Callable[..., Cell]) -> runtime.Transformers:
    """One for every test: a stage closes what it measured."""
    return runtime.load(tiny_random, make_cell(), "float32")


def never(_: Sequence[int]) -> bool:
    return False


def measured(
    job: Job, cell: Any, base: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[tuple[str, str | None], Any], Any]:
    engines = iter([cell, base])
    monkeypatch.setattr(quality, "load", lambda *_: next(engines))
    result = quality.measure(job)
    return {(m.metric, m.slice): m for m in result.measurements}, result


@pytest.fixture
def job(
    make_job: Callable[..., Job],
    make_cell: Callable[..., Cell],
    slices: Slices,
    noisy: Path,
    tiny_random: Path,
) -> Job:
    return make_job("quality", make_cell(slices=slices), noisy, tiny_random)


def test_chosen_tokens_give_what_full_rows_give(
    job: Job,
    moved: runtime.Transformers,
    engine: runtime.Transformers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that needs no list is equal; the list gives a bound under its own name."""
    full, _ = measured(job, moved, engine, monkeypatch)
    moved = runtime.load(Path(job.artifact), job.planned.cell, "float32")
    engine = runtime.load(Path(str(job.baseline)), job.planned.cell, "float32")
    found, _ = measured(job, Top(moved, 20, never), Top(engine, 20, never), monkeypatch)
    exact = {"ppl", "ln_ppl_ratio", "same_top_p", "delta_p_mean", "delta_p_rms"}
    exact |= {"accuracy", "answer_logprob"}
    assert {key[0] for key in found} == exact | {"kld_topk_mean"}
    for key, each in found.items():
        if key[0] in exact:
            assert each.value == pytest.approx(full[key].value, abs=1e-5), key
            assert each.n == full[key].n
    bound, whole = found["kld_topk_mean", None].value, full["kld_mean", None].value
    assert 0.05 * whole < bound < whole


def test_whole_lists_give_the_full_mean(
    moved: runtime.Transformers, engine: runtime.Transformers
) -> None:
    windows = prose.Windows(tuple(tuple(range(i, i + 40)) for i in range(5, 9)), 39)
    tokens = prose.Tokens.empty(windows)
    prose.collect(tokens, windows, prose.rows(moved, windows), prose.rows(engine, windows))
    tops = [truncated.told(Top(each, 512, never), windows) for each in (moved, engine)]
    found = truncated.paired(*tops)
    assert found.kl.mean() == pytest.approx(tokens.kl.mean(), rel=1e-4)
    assert found.kl == pytest.approx(tokens.kl, abs=2e-5)


def test_what_got_no_answer_is_counted_and_kept_out(
    job: Job,
    engine: runtime.Transformers,
    encoder: Encoder,
    slices: Slices,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qgrid.measure import slices as files

    items = files.load("exact", slices.items["exact"], 0)
    (prompt,) = encoder.prompts([items[3].message], chat=True)
    alone = dataclasses.replace(job, baseline=None)
    known, _ = measured(alone, Top(engine, 5, never), None, monkeypatch)
    whole = [json.loads(line) for line in (Path(job.out) / "items.jsonl").read_text().splitlines()]
    monkeypatch.setattr(truncated, "MOST_FAILED", 0.2)

    def silent(ids: Sequence[int]) -> bool:
        return list(ids[: len(prompt)]) == prompt

    found, _ = measured(alone, Top(engine, 5, silent), None, monkeypatch)
    assert found["failed_items", "exact"].value == 1
    assert found["accuracy", "exact"].n == len(items) - 1
    assert found["answer_logprob", "exact"].n == len(items) - 1
    assert {name for metric, name in found if metric == "failed_items"} == {"exact"}
    assert found["accuracy", "json"] == known["accuracy", "json"]
    partly = [json.loads(line) for line in (Path(job.out) / "items.jsonl").read_text().splitlines()]
    (failed,) = [each for each in partly if "failed" in each]
    assert (failed["id"], failed["failed"]) == (items[3].id, "silence")
    changes = {m.slice: m for m in compare.paired(partly, whole) if m.metric == "accuracy_delta"}
    assert changes["exact"].n == len(items) - 1
    assert changes["json"].n == len(items)


def test_too_many_without_an_answer_end_the_stage(engine: runtime.Transformers) -> None:
    windows = prose.Windows(tuple(tuple(range(i, i + 20)) for i in range(20)), 19)
    few = truncated.told(Top(engine, 5, lambda ids: ids[0] < 2), windows)
    assert sorted(few.failed) == [0, 1]
    assert sorted(few.chosen) == list(range(2, 20))
    with pytest.raises(TooManyFailed, match=r"3 of 20 windows of prose got no answer .*silence"):
        truncated.told(Top(engine, 5, lambda ids: ids[0] < 3), windows)
    answered = [answers.Answered("s", str(i), 0, None, True, None, "a") for i in range(10)]
    failed = [dataclasses.replace(each, failed="why") for each in answered[:2]]
    with pytest.raises(TooManyFailed, match="2 of 10 items of slice `s`"):
        answers.summary("s", [*failed, *answered[2:]])


def test_windows_that_one_of_two_did_not_answer_are_in_neither(
    engine: runtime.Transformers,
) -> None:
    windows = prose.Windows(tuple(tuple(range(i, i + 20)) for i in range(20)), 19)
    one = truncated.told(Top(engine, 5, lambda ids: ids[0] == 4), windows)
    other = truncated.told(Top(engine, 5, lambda ids: ids[0] == 9), windows)
    tokens = truncated.paired(one, other)
    assert tokens.nll.shape == (18, 19)
    assert np.array_equal(tokens.nll, tokens.base_nll)


def test_a_window_that_the_baseline_did_not_answer_is_told(
    job: Job,
    moved: runtime.Transformers,
    engine: runtime.Transformers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(truncated, "MOST_FAILED", 0.5)
    turns = itertools.count()
    base = Top(engine, 5, lambda _: next(turns) == 1)
    found, result = measured(job, Top(moved, 5, never), base, monkeypatch)
    assert result.observed["failed_windows"] == {1: "silence"}
    scored = job.planned.cell.context - 1
    assert found["ppl", None].n == (result.observed["windows"] - 1) * scored


def test_without_log_probabilities_only_replies_are_measured(
    job: Job, engine: runtime.Transformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = dataclasses.replace(job, baseline=None)
    other = runtime.load(Path(str(job.baseline)), job.planned.cell, "bfloat16")
    full, _ = measured(alone, engine, other, monkeypatch)
    engine = runtime.load(Path(str(job.baseline)), job.planned.cell, "float32")
    found, result = measured(alone, Mute(engine, 5, never), None, monkeypatch)
    assert set(found) == {("accuracy", "exact"), ("accuracy", "json")}
    assert all(found[key].value == full[key].value for key in found)
    left_out = result.observed["left_out"]
    assert set(left_out) == {"choice", "documents", "prose"}
    assert set(left_out.values()) == {"this one tells none"}
    lines = [json.loads(line) for line in (Path(job.out) / "items.jsonl").read_text().splitlines()]
    assert {each["slice"] for each in lines} == {"exact", "json"}
    assert {each["answer_logprob"] for each in lines} == {None}
    changes = compare.paired(lines, lines)
    assert {m.metric for m in changes} >= {"accuracy_delta", "mcnemar_p"}
    assert "answer_logprob_delta" not in {m.metric for m in changes}


def test_a_log_probability_that_is_none_is_no_number(engine: runtime.Transformers) -> None:
    class Broken(Top):
        def score(self, *arguments: Any, **more: Any) -> Iterator[TopScores]:
            for each in super().score(*arguments, **more):
                yield dataclasses.replace(each, chosen=each.chosen * math.nan)

    windows = prose.Windows((tuple(range(20)),), 19)
    with pytest.raises(InvalidEngine, match="NaN or infinity"):
        truncated.told(Broken(engine, 5, never), windows)


def test_two_places_of_one_model_are_no_baseline_of_themselves(
    make_job: Callable[..., Job], make_cell: Callable[..., Cell], tiny_random: Path
) -> None:
    """Nothing that is stored tells two endpoints apart; their addresses do."""
    from qgrid.types import Method, Runtime

    options = {"base_url": "http://a/v1", "baseline_url": None, "baseline_model": None}
    own = Runtime("openai", "bfloat16", "bfloat16", None, options)
    cell = make_cell(method=Method("served", {}), runtime=own)
    assert loading.is_baseline(make_job("quality", cell, tiny_random, tiny_random))
    more = {"baseline_url": "http://b/v1", "api_key_env": None, "baseline_api_key_env": None}
    other = dataclasses.replace(own, options=options | more)
    cell = dataclasses.replace(cell, runtime=other)
    assert not loading.is_baseline(make_job("quality", cell, tiny_random, tiny_random))
