"""Write the held-out slices and the calibration texts: `python -m qgrid.demo.slices`."""

from __future__ import annotations

import argparse
import hashlib
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qgrid.demo import SLICES_DIR
from qgrid.demo.lookup import QUESTIONS
from qgrid.demo.problems import LEVELS, Maker, Problem, Question, draw
from qgrid.demo.prose import prose
from qgrid.demo.seeds import HELD_OUT_SHARE, Split, document_rng
from qgrid.demo.tasks import SAMPLED, SLICES, conversation
from qgrid.demo.tokenizer import END

VERSION = "1"
ITEMS_PER_SLICE = 500
PER_LEVEL = ITEMS_PER_SLICE // len(LEVELS)
PROSE_DOCUMENTS, PROSE_CHARS = 120, 4_000
CALIBRATION_DOCUMENTS, CALIBRATION_CHARS = 512, 2_000
OTHER_DOCUMENTS = 48  # of each further calibration file; their seeds follow one another
RANDOM_CHARS = 600
INDEX_STRIDE = 1 << 32  # held-out documents of slice k are numbered from k * INDEX_STRIDE

Line = dict[str, Any]


def problems(slice_index: int, maker: Maker, level: int, count: int) -> Iterator[Problem]:
    """`count` held-out problems of one level, no first message twice."""
    seen: set[str] = set()
    index = slice_index * INDEX_STRIDE + level * (INDEX_STRIDE >> 4)
    while len(seen) < count:
        problem = draw(maker, document_rng(Split.HELD_OUT, index), level, Split.HELD_OUT)
        index += 1
        message = problem.message(problem.questions[0])
        if message not in seen:
            seen.add(message)
            yield problem


def item(identity: str, level: int, prompt: str, question: Question) -> Line:
    """One line of a slice, without optional keys that are empty."""
    line: Line = {"id": identity, "level": level, "prompt": prompt}
    if question.choices:
        line["choices"] = list(question.choices)
    line["answer"] = question.answer
    if question.schema:
        line["schema"] = question.schema
    return line


def short_lines(name: str) -> Iterator[Line]:
    """A slice in which every item has a context of its own."""
    slice_index = list(SLICES).index(name)
    number = 0
    for level in LEVELS:
        for problem in problems(slice_index, SLICES[name], level, PER_LEVEL):
            question = problem.questions[0]
            number += 1
            yield item(f"{name}-{number:04d}", level, problem.message(question), question)


def haystack_lines(name: str) -> Iterator[Line]:
    """A slice in which ten items share a document, given once before them."""
    slice_index = list(SLICES).index(name)
    number = document = 0
    for level in LEVELS:
        for problem in problems(slice_index, SLICES[name], level, PER_LEVEL // QUESTIONS):
            document += 1
            label = f"hay-{document:02d}"
            yield {"document": label, "text": problem.context}
            for question in problem.questions:
                number += 1
                line = item(f"{name}-{number:04d}", level, question.prompt, question)
                yield {**line, "document": label}


def slice_lines(name: str) -> Iterator[Line]:
    """All lines of a slice."""
    return haystack_lines(name) if name == "long_context" else short_lines(name)


def held_out_prose() -> str:
    """Prose documents for perplexity and divergence, joined by blank lines."""
    start = len(SLICES) * INDEX_STRIDE
    rngs = (document_rng(Split.HELD_OUT, start + i) for i in range(PROSE_DOCUMENTS))
    return "\n\n".join(prose(rng, PROSE_CHARS) for rng in rngs) + "\n"


def markup(problem: Problem) -> str:
    """A whole conversation as text, in the markup of the chat template."""
    return "".join(f"<|{role}|>{text}{END}" for role, text in conversation(problem))


def calibration_lines() -> Iterator[Line]:
    """Texts of the training distribution: prose and conversations by turns."""
    names = [name for name in SAMPLED if name != "long_context"]
    for i in seed_indices("calibration.jsonl"):
        rng = document_rng(Split.CALIBRATION, i)
        if i % 2 == 0:
            yield {"text": prose(rng, CALIBRATION_CHARS)}
        else:
            name = names[i // 2 % len(names)]
            problem = draw(SAMPLED[name], rng, rng.choice(LEVELS), Split.CALIBRATION)
            yield {"text": markup(problem)}


def prose_lines() -> Iterator[Line]:
    """Prose alone: half of the training distribution."""
    for i in seed_indices("calibration_prose.jsonl"):
        yield {"text": prose(document_rng(Split.CALIBRATION, i), CALIBRATION_CHARS)}


def random_lines() -> Iterator[Line]:
    """Random letters and spaces, of no distribution that the model knows."""
    letters = string.ascii_letters + " " * 8
    for i in seed_indices("calibration_random.jsonl"):
        rng = document_rng(Split.CALIBRATION, i)
        yield {"text": "".join(rng.choices(letters, k=RANDOM_CHARS))}


def seed_indices(name: str) -> range:
    """Numbers of a calibration file's documents."""
    place = list(CALIBRATIONS).index(name)
    if place == 0:
        return range(CALIBRATION_DOCUMENTS)
    start = CALIBRATION_DOCUMENTS + (place - 1) * OTHER_DOCUMENTS
    return range(start, start + OTHER_DOCUMENTS)


CALIBRATIONS: dict[str, Callable[[], Iterator[Line]]] = {
    "calibration.jsonl": calibration_lines,
    "calibration_prose.jsonl": prose_lines,
    "calibration_random.jsonl": random_lines,
}


def as_jsonl(lines: Iterator[Line]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def files() -> dict[str, str]:
    """Every slice file's text by file name."""
    texts = {f"{name}.jsonl": as_jsonl(slice_lines(name)) for name in SLICES}
    texts["prose.txt"] = held_out_prose()
    texts |= {name: as_jsonl(lines()) for name, lines in CALIBRATIONS.items()}
    return texts


def num_items(name: str, text: str) -> int:
    """How many items, calibration texts or prose documents a file holds."""
    if name == "prose.txt":
        return PROSE_DOCUMENTS
    return sum(
        "answer" in line or name in CALIBRATIONS for line in map(json.loads, text.splitlines())
    )


def seed_range(name: str) -> list[int]:
    """First and one past the last seed that a file may draw from."""
    if name in CALIBRATIONS:
        start, indices = Split.CALIBRATION.value.start, seed_indices(name)
        return [start + indices.start, start + indices.stop]
    index = list(SLICES).index(name.removesuffix(".jsonl")) if name != "prose.txt" else len(SLICES)
    start = Split.HELD_OUT.value.start + index * INDEX_STRIDE
    return [start, start + INDEX_STRIDE]


def manifest(texts: dict[str, str]) -> dict[str, Any]:
    """Version, seeds, hashes and counts of the files."""
    return {
        "version": VERSION,
        "held_out_share": f"1/{HELD_OUT_SHARE} of contents, by hash",
        "files": {
            name: {
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
                "items": num_items(name, text),
                "seeds": seed_range(name),
            }
            for name, text in texts.items()
        },
    }


def write(folder: Path) -> None:
    """Write all files and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = files()
    texts["manifest.json"] = json.dumps(manifest(texts), indent=2) + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def main(arguments: list[str] | None = None) -> None:
    """Write the slices as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m qgrid.demo.slices")
    parser.add_argument("--out", type=Path, default=SLICES_DIR)
    write(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
