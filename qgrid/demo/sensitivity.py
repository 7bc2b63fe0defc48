"""How the slices react to rounding: `python -m qgrid.demo.sensitivity --model FOLDER`.

Rounding is symmetric round-to-nearest in groups of 128 along the input of the decoder's linear
layers, computed in fp32: a watch over the training, not a quantization method.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgrid.demo import MODEL_DIR, SLICES_DIR, checkpoint
from qgrid.demo import tokenizer as tokenizers
from qgrid.demo.network import Network
from qgrid.demo.rows import Encoder, Row, flatten
from qgrid.demo.tasks import SLICES

GROUP = 128
BITS = (16, 8, 4, 3, 2)
BATCH_TOKENS = 16_384
LONG, LONG_EVERY = "long_context", 5  # haystacks cost most: every fifth question is enough here
PROSE_WINDOW = 512  # tokens


@dataclass(frozen=True)
class Item:
    """An item with the full user message; without choices the reply is generated."""

    level: int
    message: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """Whether the item was right, and the log-probability of the answer in nats."""

    level: int
    right: bool
    answer_logprob: float


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight [outputs, inputs] rounded to `bits`, symmetric, in groups of 128 inputs."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) * 2 / (2**bits - 1)
    top = 2 ** (bits - 1)
    whole: Tensor = (groups / scale).round().clamp(-top, top - 1)
    return torch.as_tensor((whole * scale).reshape(weight.shape))


def with_bits(network: Network, bits: int) -> Network:
    """A copy with the decoder's linear layers rounded; 16 bits leave them alone."""
    network = copy.deepcopy(network)
    if bits < 16:
        with torch.no_grad():
            for layer in network.model.layers.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.copy_(rounded(layer.weight, bits))
    return network


def read_items(path: Path, every: int = 1) -> list[Item]:
    """Every n-th item of a slice file."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = {line["document"]: line["text"] for line in lines if "text" in line}
    questions = [line for line in lines if "answer" in line][::every]
    return [
        Item(
            line["level"],
            f"{texts[line['document']]}\n\n{line['prompt']}"
            if "document" in line
            else line["prompt"],
            line["answer"],
            tuple(line.get("choices", ())),
        )
        for line in questions
    ]


def reply_row(encoder: Encoder, item: Item, reply: str) -> Row:
    """The conversation up to a reply, whose tokens are scored (with the end if generated)."""
    prompt, body = encoder.prompt(item.message), encoder.text(reply)
    body = body if item.choices else [*body, encoder.end]
    return Row(prompt + body, [0.0] * len(prompt) + [1.0] * len(body))


def batches(rows: list[Row]) -> Iterator[list[int]]:
    """Indices of the rows, shortest first, in groups of at most `BATCH_TOKENS` tokens."""
    group: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        if group and (len(group) + 1) * len(rows[i].ids) > BATCH_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@torch.no_grad()
def predictions(
    network: Network, encoder: Encoder, rows: list[Row]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Index, log-probabilities [scored, vocab] and targets [scored] of each row."""
    for chosen in batches(rows):
        batch = flatten([rows[i] for i in chosen], encoder.pad)
        hidden = network(batch.ids, batch.positions, batch.segments)[batch.scored]
        logprobs = network.logits(hidden).float().log_softmax(-1)
        for owner, i in enumerate(chosen):  # sorted by length, so rows keep their order
            own = batch.owners == owner
            yield i, logprobs[own], batch.targets[own]


def total(logprobs: Tensor, targets: Tensor) -> float:
    """Log-probability of all targets together."""
    return float(logprobs.gather(1, targets[:, None]).sum())


def score_items(network: Network, encoder: Encoder, items: list[Item]) -> list[Score]:
    """Score each item: the likeliest choice, or the greedy reply."""
    found: dict[int, Score] = {}
    for ask, kind in ((_score_short, True), (_score_long, False)):
        chosen = [i for i, item in enumerate(items) if _is_short(encoder, item) is kind]
        found |= zip(chosen, ask(network, encoder, [items[i] for i in chosen]), strict=True)
    return [found[i] for i in range(len(items))]


def _is_short(encoder: Encoder, item: Item) -> bool:
    """Whether one prediction scores all choices."""
    return bool(item.choices) and all(len(encoder.text(c)) == 1 for c in item.choices)


def _score_short(network: Network, encoder: Encoder, items: list[Item]) -> list[Score]:
    """Items whose choices are single tokens: one row each."""
    rows = [reply_row(encoder, item, item.answer) for item in items]
    found: dict[int, Score] = {}
    for i, logprobs, _ in predictions(network, encoder, rows):
        ids = [encoder.text(choice)[0] for choice in items[i].choices]
        found[i] = _chosen(items[i], logprobs[0, ids].tolist())
    return [found[i] for i in range(len(items))]


def _score_long(network: Network, encoder: Encoder, items: list[Item]) -> list[Score]:
    """Other items: one row for each choice, or the one right reply."""
    asked = [(i, reply) for i, item in enumerate(items) for reply in item.choices or [item.answer]]
    rows = [reply_row(encoder, items[i], reply) for i, reply in asked]
    found = {
        j: (total(logprobs, targets), bool((logprobs.argmax(-1) == targets).all()))
        for j, logprobs, targets in predictions(network, encoder, rows)
    }
    replies: list[list[tuple[float, bool]]] = [[] for _ in items]
    for j, (i, _) in enumerate(asked):
        replies[i].append(found[j])
    return [
        _chosen(item, [logprob for logprob, _ in own])
        if item.choices
        else Score(item.level, own[0][1], own[0][0])
        for item, own in zip(items, replies, strict=True)
    ]


def _chosen(item: Item, totals: list[float]) -> Score:
    """The score of an item from the log-probability of each choice."""
    answer = item.choices.index(item.answer)
    return Score(item.level, totals.index(max(totals)) == answer, totals[answer])


@torch.no_grad()
def prose_loss(network: Network, encoder: Encoder, text: str, num_tokens: int) -> float:
    """Mean loss in nats of the first tokens of a text, in windows of 512."""
    ids = encoder.text(text[: num_tokens * 6])[:num_tokens]
    windows = [ids[i : i + PROSE_WINDOW] for i in range(0, len(ids), PROSE_WINDOW)]
    rows = [Row(window, [1.0] * len(window)) for window in windows if len(window) == PROSE_WINDOW]
    totals = [total(*found) for _, *found in predictions(network, encoder, rows)]
    return -sum(totals) / (len(rows) * (PROSE_WINDOW - 1))


def summary(scores: list[Score]) -> dict[str, Any]:
    """Accuracy, accuracy by level, mean log-probability of the answer."""
    by_level = [[s.right for s in scores if s.level == level] for level in range(1, 6)]
    return {
        "accuracy": round(sum(s.right for s in scores) / len(scores), 4),
        "by_level": [round(sum(right) / max(1, len(right)), 3) for right in by_level],
        "answer_logprob": round(sum(s.answer_logprob for s in scores) / len(scores), 4),
        "items": len(scores),
    }


def measure(
    network: Network, encoder: Encoder, slices: Path, every: int, bits: tuple[int, ...] = BITS
) -> dict[str, Any]:
    """Scores of every slice and the loss on prose, by bits."""
    items = {
        name: read_items(slices / f"{name}.jsonl", LONG_EVERY * every if name == LONG else every)
        for name in SLICES
    }
    text = (slices / "prose.txt").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    for width in bits:
        rounded_network = with_bits(network, width)
        found[str(width)] = {
            name: summary(score_items(rounded_network, encoder, items[name])) for name in SLICES
        }
        tokens = 100_000 // every
        found[str(width)]["prose"] = {
            "loss": round(prose_loss(rounded_network, encoder, text, tokens), 5)
        }
    return found


def main(arguments: list[str] | None = None) -> None:
    """Score a model folder and write or print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m qgrid.demo.sensitivity")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--slices", type=Path, default=SLICES_DIR)
    parser.add_argument("--every", type=int, default=1, help="score every n-th item")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    network = checkpoint.read_network(args.model)
    encoder = Encoder(tokenizers.load(args.model))
    scores = measure(network, encoder, args.slices, args.every, tuple(args.bits))
    if args.out:
        checkpoint.write_aside(args.out, json.dumps(scores, indent=1) + "\n")
    for name in (*SLICES, "prose"):
        cells = (f"{width}: {_brief(cell[name])}" for width, cell in scores.items())
        sys.stdout.write(" ".join([f"{name:15s}", *cells]) + "\n")


def _brief(cell: dict[str, Any]) -> str:
    if "loss" in cell:
        return f"{cell['loss']:.3f}"
    return f"{cell['accuracy']:.3f} {cell['by_level']}"


if __name__ == "__main__":
    main()
