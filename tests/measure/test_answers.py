"""Scoring of items against naive loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qgrid.contracts import Generation, InvalidEngine, Scores
from qgrid.measure import answers
from qgrid.measure import slices as slice_files
from qgrid.measure.answers import Answered
from qgrid.measure.encoding import Encoder, NoChatTemplate, TooLong
from qgrid.measure.slices import Item
from qgrid.runtimes import transformers as runtime
from qgrid.types import Slice, Slices


@pytest.fixture(scope="module")
def naive(tiny_random: Path) -> Callable[[str, str], float]:
    """Summed log-probability of a reply after a chat prompt, one plain forward pass each."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_random)
    model = AutoModelForCausalLM.from_pretrained(tiny_random, dtype=torch.float32).eval()

    def logprob(message: str, reply: str) -> float:
        turns = [{"role": "user", "content": message}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        ids = tokenizer(reply, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0].double()
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return float(rows[torch.arange(len(ids)), torch.tensor(ids)].sum())

    return logprob


@pytest.mark.parametrize("name", ["choice", "documents"])
def test_choices_equal_a_naive_loop(
    name: str,
    slices: Slices,
    engine: runtime.Transformers,
    encoder: Encoder,
    naive: Callable[[str, str], float],
) -> None:
    """Batches, shared prompts and shared documents change nothing."""
    items = slice_files.load(name, slices.items[name], 0)
    assert any(item.document for item in items) == (name == "documents")
    found = answers.answer(name, slices.items[name], items, engine, encoder)
    for item, result in zip(items, found, strict=True):
        values = {choice: naive(item.message, choice) for choice in item.choices}
        assert result.answer_logprob == pytest.approx(values[item.answer], abs=1e-4)
        assert result.reply == max(values, key=values.__getitem__)
        assert result.correct == (result.reply == item.answer)


def test_single_token_choices_take_one_row_each(
    engine: runtime.Transformers, encoder: Encoder, naive: Callable[[str, str], float]
) -> None:
    words = ("red", "green", "blue")
    assert all(len(encoder.text(word)) == 1 for word in words)
    items = [Item(str(i), 0, f"item {i}", words[i], words, None, None) for i in range(3)]
    asked: list[Sequence[Sequence[int]]] = []

    class Counting:
        def score(
            self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int]
        ) -> Iterator[Scores]:
            asked.append(sequences)
            return engine.score(sequences, keep, prefix)

    wanted = Slice("", "choice", True, None, 1)
    found = answers.answer("one", wanted, items, Counting(), encoder)  # type: ignore[arg-type]
    assert [len(sequences) for sequences in asked] == [3]
    for item, result in zip(items, found, strict=True):
        expected = naive(item.message, item.answer)
        assert result.answer_logprob == pytest.approx(expected, abs=1e-4)


def test_replies_equal_a_naive_loop(
    slices: Slices,
    engine: runtime.Transformers,
    encoder: Encoder,
    naive: Callable[[str, str], float],
) -> None:
    items = slice_files.load("exact", slices.items["exact"], 0)
    found = answers.answer("exact", slices.items["exact"], items, engine, encoder)
    prompts = encoder.prompts([item.message for item in items], chat=True)
    for item, prompt, result in zip(items, prompts, found, strict=True):
        alone = engine.generate([prompt], 4, encoder.stops)[0].ids
        assert result.reply == encoder.decode(alone).strip()
        assert result.answer_logprob == pytest.approx(naive(item.message, item.answer), abs=1e-4)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ('{"n": 1, "w": "a"}', True),
        ('{"w":"a","n":1}', True),
        ('{"n": 2, "w": "a"}', False),
        ('{"n": true, "w": "a"}', False),
        ('{"n": "1", "w": "a"}', False),
        ('{"n": 1}', False),
        ('{"n": 1, "w": "a"} and more', False),
        ("", False),
        ("[" * 100_000, False),
        ("1" * 5_000, False),
    ],
)
def test_json_replies_are_judged_by_schema_and_value(reply: str, right: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "w": {"type": "string"}},
        "required": ["n", "w"],
    }
    item = Item("1", 0, "", '{"n": 1, "w": "a"}', (), None, schema)
    assert answers._is_json_right(reply, item) is right


def test_a_right_value_that_breaks_the_schema_is_wrong() -> None:
    item = Item("1", 0, "", '{"n": 1}', (), None, {"type": "array"})
    assert not answers._is_json_right('{"n": 1}', item)


def test_chat_without_a_template_is_refused(tiny_random: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_random, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(NoChatTemplate, match="set `chat: false`"):
        Encoder(folder).prompts(["hello"], chat=True)


def test_an_item_beyond_the_positions_is_refused(
    slices: Slices, engine: runtime.Transformers, encoder: Encoder
) -> None:
    long = Item("x", 0, "red " * 4100, "red", ("red", "blue"), None, None)
    wanted = {"choice": Slice("", "choice", True, None, 1), "exact": slices.items["exact"]}
    for name, each in wanted.items():
        with pytest.raises(TooLong, match=rf"item `x` of slice `{name}` .* has 4096 positions"):
            answers.answer(name, each, [long], engine, encoder)


def test_long_prompts_are_generated_fewer_at_a_time() -> None:
    lengths = [100] * 70 + [20_000, 5_000, 40_000]
    parts = list(answers._together(lengths))
    assert sorted(i for part in parts for i in part) == list(range(73))
    assert [len(part) for part in parts] == [64, 6, 1, 1, 1]
    assert [len(part) for part in answers._together([4096] * 10)] == [8, 2]
    assert list(answers._together([])) == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_is_invalid(encoder: Encoder, value: float) -> None:
    class Broken:
        def score(self, sequences: Any, keep: Any, prefix: Any) -> Iterator[Scores]:
            for i, count in enumerate(keep):
                yield Scores(i, 0, torch.full((count, 512), value))

        def generate(self, prompts: Any, *_: Any) -> list[Generation]:
            return [Generation((), ()) for _ in prompts]

    items = [Item("x", 0, "ask", "red", ("red", "blue"), None, None)]
    wanted = Slice("", "choice", True, None, 1)
    with pytest.raises(InvalidEngine, match="NaN or infinity for `x`"):
        answers.answer("s", wanted, items, Broken(), encoder)  # type: ignore[arg-type]


def results(right: Sequence[bool], documents: Sequence[str | None]) -> list[Answered]:
    pairs = zip(right, documents, strict=True)
    return [Answered("s", str(i), 0, d, c, -1.0 - i, "") for i, (c, d) in enumerate(pairs)]


def test_summary_has_a_wilson_interval_or_clusters() -> None:
    from qgrid import stats

    right = [True] * 30 + [False] * 10
    alone = answers.summary("s", results(right, [None] * 40))[0]
    assert (alone.value, alone.n, alone.slice) == (0.75, 40, "s")
    assert (alone.low, alone.high) == stats.wilson(30, 40)
    labels = [f"d{i // 10}" for i in range(40)]
    together = answers.summary("s", results(right, labels))[0]
    assert together.stderr is not None and alone.stderr is not None
    assert together.stderr > 2 * alone.stderr
    assert together.low is not None and alone.low is not None
    assert together.low < alone.low


def test_one_document_says_nothing_of_its_spread() -> None:
    found = answers.summary("s", results([True, False, True, True], ["d"] * 4))[0]
    assert (found.value, found.stderr, found.low, found.high) == (0.75, None, None, None)


def test_a_perfect_slice_still_has_an_interval() -> None:
    found = answers.summary("s", results([True] * 20, [None] * 20))[0]
    assert found.high == 1.0
    assert found.low is not None and 0.8 < found.low < 1.0
