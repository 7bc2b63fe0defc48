"""Scoring with llama.cpp: several sequences in one pass, shared beginnings computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qgrid.contracts import Scores
from qgrid.gguf import log
from qgrid.runtimes._batches import (
    CHUNK_ROWS,
    Family,
    Request,
    families,
    require_rows,
    runs,
    within_rows,
)
from qgrid.runtimes._llama_model import Context, Room
from qgrid.runtimes._llama_pieces import Piece, passes

if TYPE_CHECKING:
    import torch

    from qgrid.runtimes._llama_model import Rows

PLACES = 64  # sequences that one pass scores, at most
GROUP_BYTES = 256 * 2**20  # log-probabilities that wait for their turn
PROSE_ROWS = 32  # from here on a sequence is prose rather than an answer
_PREFIX = 0  # the place that holds the prefix; sequences stand behind it


class Scorer:
    """Computes `Engine.score`; `contexts` gives a context with at least the room asked for.

    `tokens` is the number of tokens up to which short sequences are put into one pass: more at
    once would make every one of them look past the cells of all others. Prose is never put
    together: whose cells lie beside its own shows in the fourth digit of a perplexity.
    """

    def __init__(
        self, contexts: Callable[[Room], Context], tokens: int, vocab: int, threads: int
    ) -> None:
        self._contexts = contexts
        self._places = min(PLACES, tokens - 1)  # a pass must have room for a token of each
        self._tokens = tokens
        self._max_rows = max(CHUNK_ROWS, GROUP_BYTES // (4 * vocab))
        self._threads = threads

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int]
    ) -> Iterator[Scores]:
        """See `Engine.score`."""
        import torch

        torch.set_num_threads(self._threads)
        # With the last token of the prefix in front, every wanted row comes from a real token.
        lead, head = tuple(prefix[-1:]), tuple(prefix[:-1])
        requests = [
            Request(i, (*lead, *ids), count)
            for i, (ids, count) in enumerate(zip(sequences, keep, strict=True))
        ]
        for request in requests:
            require_rows(request, len(lead))
        packs = list(self._packs(requests))
        longest = max((sum(family.tokens for family in pack) for pack in packs), default=0)
        room = Room(self._places + 1, len(head) + longest, shared=True, outputs=CHUNK_ROWS)
        context = self._contexts(room)
        self._read(context, head)
        used = 0
        for pack in packs:
            count = sum(len(family.members) for family in pack)
            self._spread(context, head, used, count)
            used = count
            if pack[0].members[0].keep > CHUNK_ROWS:
                yield from self._long(context, pack[0].members[0], len(head), len(lead))
            else:
                yield from self._short(context, pack, len(head), len(lead))

    def _packs(self, requests: Sequence[Request]) -> Iterator[list[Family]]:
        """Families that are computed together, in the order of their requests."""
        for run in runs(requests):
            if run[0].keep > CHUNK_ROWS:
                yield [Family((), (run[0],))]
                continue
            for part in within_rows(run, self._max_rows):
                for begin in range(0, len(part), self._places):
                    yield from self._packed(families(part[begin : begin + self._places]))

    def _packed(self, found: Sequence[Family]) -> Iterator[list[Family]]:
        pack: list[Family] = []
        tokens = 0
        for family in found:
            prose = max(member.keep for member in family.members) >= PROSE_ROWS
            size = max(self._tokens, family.tokens) if prose else family.tokens
            if pack and tokens + size > self._tokens:
                yield pack
                pack, tokens = [], 0
            pack.append(family)
            tokens += size
        if pack:
            yield pack

    def _read(self, context: Context, head: Sequence[int]) -> None:
        """Forget everything, then read the prefix."""
        with log.captured():
            context.clear()
            for group in passes([Piece(head, 0, (_PREFIX,), 0)] if head else [], context.batch):
                context.decode(group)

    def _spread(self, context: Context, head: Sequence[int], used: int, count: int) -> None:
        """Forget the `used` sequences before; let `count` new ones begin with the prefix."""
        with log.captured():
            if not head:
                context.clear()
                return
            for place in range(1, used + 1):
                context.forget(place)
            for place in range(1, count + 1):
                context.copy(_PREFIX, place)

    def _short(
        self, context: Context, pack: Sequence[Family], head: int, lead: int
    ) -> Iterator[Scores]:
        parts = []
        size = min(context.batch, CHUNK_ROWS)  # the library aborts at more rows than set aside
        with log.captured():
            for group in passes(list(_pieces(pack, head)), size):
                parts.append(_normalized(context.decode(group)))
        rows = _joined(parts)
        begin = 0
        for family in pack:
            for member in family.members:
                end = begin + member.keep
                start = len(member.ids) - member.keep - lead
                yield Scores(member.index, start, rows[begin:end])
                begin = end

    def _long(self, context: Context, request: Request, head: int, lead: int) -> Iterator[Scores]:
        """Pieces of `CHUNK_ROWS` tokens from the start: their borders depend on nothing else."""
        inputs = request.ids[:-1]
        first = len(inputs) - request.keep  # the first input whose row is wanted
        for begin in range(0, len(inputs), CHUNK_ROWS):
            ids = inputs[begin : begin + CHUNK_ROWS]
            count = max(0, min(len(ids), begin + len(ids) - first))
            with log.captured():
                piece = Piece(ids, head + begin, (1,), count)
                parts = [
                    _normalized(context.decode(group)) for group in passes([piece], context.batch)
                ]
            if count:
                start = begin + len(ids) - count + 1 - lead
                yield Scores(request.index, start, _joined(parts))


def _pieces(pack: Sequence[Family], head: int) -> Iterator[Piece]:
    """Tokens of a pack: each stem once, as a part of all its sequences, then every tail."""
    place = 1
    for family in pack:
        places = range(place, place + len(family.members))
        if family.stem:
            yield Piece(family.stem, head, places, 0)
        start = head + len(family.stem)
        for own, member in zip(places, family.members, strict=True):
            yield Piece(member.ids[len(family.stem) : -1], start, (own,), member.keep)
        place += len(family.members)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _normalized(logits: Rows) -> torch.Tensor:
    """Log-probabilities of rows that the library will overwrite."""
    import torch

    return torch.log_softmax(torch.from_numpy(logits), dim=-1)
