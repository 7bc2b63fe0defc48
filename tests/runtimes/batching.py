"""Logits of sequences decoded token by token, alone and together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qgrid.gguf import log
from qgrid.runtimes._llama_model import Room
from qgrid.runtimes._llama_pieces import Piece
from qgrid.runtimes.llama_cpp import LlamaCpp

FED = 16  # tokens at the end of a sequence that go in one at a time


def decoded(engine: LlamaCpp, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities `(sequences, FED, vocab)` after each of the last tokens.

    The sequences are of one length and decode together, as `generate` decodes them.
    """
    places = range(len(sequences))
    head = len(sequences[0]) - FED
    context = engine._context(Room(len(sequences), head + FED, shared=False, outputs=len(places)))
    rows = []
    with log.captured():
        context.clear()
        for place, ids in zip(places, sequences, strict=True):
            context.decode([Piece(ids[:head], 0, (place,), 0)])
        for at in range(head, head + FED):
            step = [Piece(ids[at : at + 1], at, (p,), 1) for p, ids in enumerate(sequences)]
            rows.append(torch.from_numpy(context.decode(step).copy()))
    return torch.log_softmax(torch.stack(rows, 1), -1)


def divergence(engine: LlamaCpp, sequences: Sequence[Sequence[int]]) -> float:
    """Mean KL in nats of decoding together from decoding one at a time, the same tokens fed."""
    together = decoded(engine, sequences)
    alone = torch.cat([decoded(engine, [ids]) for ids in sequences])
    return float((alone.exp() * (alone - together)).sum(-1).mean())
