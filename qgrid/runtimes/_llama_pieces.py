"""Tokens on their way to llama.cpp: pure arithmetic, no library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Successive tokens of the sequences in `places`, from position `start` on.

    Logits of the last `rows` of them are wanted.
    """

    ids: Sequence[int]
    start: int
    places: Sequence[int]
    rows: int

    def cut(self, length: int) -> tuple[Piece, Piece]:
        """The first `length` tokens, and the rest."""
        rest = len(self.ids) - length
        first = Piece(self.ids[:length], self.start, self.places, max(0, self.rows - rest))
        return first, Piece(
            self.ids[length:], self.start + length, self.places, min(self.rows, rest)
        )


def passes(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """The pieces, cut where needed, in groups of at most `size` tokens."""
    group: list[Piece] = []
    room = size
    for whole in pieces:
        piece = whole
        while len(piece.ids) > room:
            first, piece = piece.cut(room)
            yield [*group, first] if room else group
            group, room = [], size
        group.append(piece)
        room -= len(piece.ids)
    if group:
        yield group
