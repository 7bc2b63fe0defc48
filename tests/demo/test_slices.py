"""The shipped slices are the generated ones, complete and unseen in training."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from qgrid.demo import MODEL_DIR, SLICES_DIR, slices
from qgrid.demo.problems import LEVELS, draw
from qgrid.demo.seeds import Split, document_rng
from qgrid.demo.tasks import SLICES, TRAINED

KEYS = {"id", "level", "prompt", "choices", "answer", "document", "schema"}


def lines(name: str) -> list[dict[str, Any]]:
    text = (SLICES_DIR / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def items(name: str) -> list[dict[str, Any]]:
    return [line for line in lines(name) if "answer" in line]


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SLICES_DIR / "manifest.json").read_text())
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def test_regeneration_gives_the_shipped_bytes(tmp_path: Path) -> None:
    slices.write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in SLICES_DIR.iterdir()}
    for name in names:
        assert (tmp_path / name).read_bytes() == (SLICES_DIR / name).read_bytes(), name


def test_hashes_and_counts_are_those_of_the_manifest(manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        data = (SLICES_DIR / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
        assert slices.num_items(name, data.decode()) == entry["items"], name


def test_seed_ranges_of_the_files_are_disjoint(manifest: dict[str, Any]) -> None:
    ranges = sorted(entry["seeds"] for entry in manifest["files"].values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert all(start >= Split.TRAIN.value.stop for start, _ in ranges)


@pytest.mark.parametrize("name", list(SLICES))
def test_five_hundred_well_formed_items(name: str) -> None:
    found = items(name)
    assert len(found) == 500
    assert len({item["id"] for item in found}) == 500
    assert {level: sum(i["level"] == level for i in found) for level in LEVELS} == dict.fromkeys(
        LEVELS, 100
    )
    for item in found:
        assert set(item) <= KEYS
        assert item["answer"] in item.get("choices", [item["answer"]])
        assert ("schema" in item) == (name == "structured") == ("choices" not in item)


@pytest.mark.parametrize("name", list(SLICES))
def test_answers_have_at_most_eight_tokens(name: str, tokenizer: Tokenizer) -> None:
    assert max(len(tokenizer.encode(item["answer"]).ids) for item in items(name)) <= 8


def test_structured_answers_follow_their_schema() -> None:
    for item in items("structured"):
        jsonschema.validate(json.loads(item["answer"]), item["schema"])


def test_haystacks_hold_ten_questions_each_and_fit(tokenizer: Tokenizer) -> None:
    texts = {line["document"]: line["text"] for line in lines("long_context") if "text" in line}
    asked = [item["document"] for item in items("long_context")]
    assert len(texts) == 50
    assert all(asked.count(label) == 10 for label in texts)
    sizes = [len(tokenizer.encode(text).ids) for text in texts.values()]
    assert min(sizes) >= 1000 and max(sizes) <= 4000


def test_prose_is_long_enough(tokenizer: Tokenizer) -> None:
    text = (SLICES_DIR / "prose.txt").read_text(encoding="utf-8")
    assert len(tokenizer.encode(text).ids) >= 100_000


@pytest.mark.parametrize("name", [name for name in SLICES if name != "long_context"])
def test_no_held_out_prompt_occurs_in_training(name: str) -> None:
    held_out = {item["prompt"] for item in items(name)}
    for index in range(3000):
        problem = draw(TRAINED[name], document_rng(Split.TRAIN, index), 1 + index % 5, Split.TRAIN)
        assert problem.message(problem.questions[0]) not in held_out


def test_no_haystack_occurs_in_calibration() -> None:
    texts = {line["text"] for line in lines("long_context") if "text" in line}
    assert not any(text in line["text"] for line in lines("calibration") for text in texts)
