"""Documents as token rows with loss weights, and rows as one flat batch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qgrid.demo.lexicon import NAMES
from qgrid.demo.network import Segment
from qgrid.demo.tasks import Turn
from qgrid.demo.tokenizer import ASSISTANT, END, PAD, USER

PROSE = ("prose", 0)  # the kind of rows that are no task
TOKENS_MULTIPLE = 512  # of a batch: few shapes for the matrix kernels
PADDED = (
    *range(8, 64, 8),
    *range(64, 192, 16),
    *range(192, 384, 32),
    *range(384, 1024, 64),
    *range(1024, 4097, 256),
)


@dataclass(frozen=True)
class Row:
    """Token ids, the loss weight of predicting each, and the (task, level) it trains."""

    ids: list[int]
    weights: list[float]
    kind: tuple[str, int] = PROSE


@dataclass(frozen=True)
class Batch:
    """Rows laid out flat; `scored` are the positions whose next token has a loss weight."""

    ids: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    segments: list[Segment]
    scored: Tensor  # [predictions], indices into tokens
    targets: Tensor  # [predictions]
    weights: Tensor  # [predictions]
    owners: Tensor  # [predictions], index of the row
    kinds: list[tuple[str, int]]  # of each row


class Encoder:
    """Turns texts and conversations into rows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad, self.user, self.assistant, self.end = (
            self.special(text) for text in (PAD, USER, ASSISTANT, END)
        )

        self.keys = frozenset(i for name in NAMES for i in self.text(f" {name}"))

    def special(self, text: str) -> int:
        """The id of a special token."""
        found = self.tokenizer.token_to_id(text)
        if found is None:
            raise ValueError(f"the tokenizer lacks the special token {text!r}")
        return int(found)

    def text(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(self, message: str) -> list[int]:
        """Token ids up to where the assistant's reply begins."""
        return [self.user, *self.text(message), self.end, self.assistant]

    def chat(self, turns: list[Turn], kind: tuple[str, int]) -> Row:
        """A conversation; only the replies carry loss, without the names that a drill draws."""
        ids: list[int] = []
        weights: list[float] = []
        for role, text in turns:
            body = [*self.text(text), self.end]
            answered = role == "assistant"
            ids += [self.assistant if answered else self.user, *body]
            weights += [0.0, *(float(answered and i not in self.keys) for i in body)]
        return Row(ids, weights, kind)

    def prose(self, text: str, num_tokens: int, weight: float) -> Row:
        """Plain text cut to a length; every token carries loss."""
        ids = self.text(text)[:num_tokens]
        return Row(ids, [weight] * len(ids))


def padded_length(num_tokens: int) -> int:
    """The next length that rows are padded to."""
    return int(next(length for length in PADDED if length >= num_tokens))


def flatten(rows: list[Row], pad: int) -> Batch:
    """One batch of all rows, grouped by padded length."""
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[padded_length(len(row.ids))].append(row)
    ordered = [(length, row) for length in sorted(groups) for row in groups[length]]
    ids: list[int] = []
    weights: list[float] = []
    positions: list[int] = []
    owners: list[int] = []
    for owner, (length, row) in enumerate(ordered):
        gap = length - len(row.ids)
        ids += row.ids + [pad] * gap
        weights += [*row.weights[1:], *[0.0] * (gap + 1)]
        positions += range(length)
        owners += [owner] * length
    gap = -len(ids) % TOKENS_MULTIPLE
    ids += [pad] * gap
    weights += [0.0] * gap
    positions += range(gap)
    owners += [len(ordered)] * gap
    segments = [Segment(len(groups[n]), n) for n in sorted(groups)]
    segments += [Segment(1, gap)] if gap else []
    all_ids, all_weights = torch.tensor(ids), torch.tensor(weights)
    scored = all_weights.nonzero().squeeze(1)
    return Batch(
        all_ids,
        torch.tensor(positions),
        segments,
        scored,
        all_ids[scored + 1],
        all_weights[scored],
        torch.tensor(owners)[scored],
        [row.kind for _, row in ordered],
    )
