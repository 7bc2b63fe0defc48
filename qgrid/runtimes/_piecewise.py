"""Scoring through a quantized KV cache: sequences are read in pieces, as decoding would fill it.

One forward pass over a window never reads the cache that it fills. Read in pieces, each token sees
the earlier ones as the cache holds them. Pieces begin at the first token of every sequence, and
rows are padded on the right, so a sequence's numbers do not depend on its neighbours in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qgrid.contracts import Scores
from qgrid.runtimes import _kv_cache
from qgrid.runtimes._batches import CHUNK_ROWS, Request, cuts, require_rows, runs, within_rows
from qgrid.runtimes._kv_used import Used
from qgrid.runtimes._scoring import GROUP_BYTES, normalized, padded

if TYPE_CHECKING:
    import torch

    from qgrid.runtimes._kv_cache import Quantization

_HELD_PASSES = 8  # a batch's caches hold at most so many times the tokens of one forward pass


@dataclass(frozen=True)
class Root:
    """The whole pieces that every sequence begins with, read once; `cache` has one row."""

    cache: Any
    length: int


class PieceScorer:
    """Computes `Engine.score` for a causal language model with a quantized cache.

    `max_tokens` bounds the tokens of one padded forward pass. Models with sliding windows have no
    such cache. `used` is told of the caches that were read from, and of the rows.
    """

    def __init__(
        self, model: Any, cache: Quantization, max_tokens: int, pad: int, used: Used | None = None
    ) -> None:
        self._model = model
        self._quantization = cache
        self._used = Used(cache) if used is None else used
        self._piece = cache.piece
        self._max_tokens = max_tokens
        self._pad = pad
        self._device = next(model.parameters()).device
        vocab = model.get_output_embeddings().out_features
        self._max_rows = max(CHUNK_ROWS, GROUP_BYTES // (4 * vocab))

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int]
    ) -> Iterator[Scores]:
        """See `Engine.score`."""
        requests = [
            Request(i, (*prefix, *ids), count)
            for i, (ids, count) in enumerate(zip(sequences, keep, strict=True))
        ]
        for request in requests:
            require_rows(request, len(prefix))
        root = self._root(prefix) if len(requests) > 1 else None
        for group in runs(requests):
            if group[0].keep > CHUNK_ROWS:
                yield from self._long(group[0], root, len(prefix))
            else:
                for part in within_rows(group, self._max_rows):
                    yield from self._short(part, root, len(prefix))

    def prompt(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Padded prompts as `model.generate` takes them, and the cache that it is to fill."""
        ids, mask = padded(prompts, self._pad, self._device)
        cache = _kv_cache.for_decoding(self._model, self._quantization)
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}

    def _root(self, prefix: Sequence[int]) -> Root | None:
        """Its last token stays out: the first row may come from it."""
        length = (len(prefix) - 1) // self._piece * self._piece
        if length <= 0:
            return None
        cache = _kv_cache.for_scoring(self._model, self._quantization)
        for begin in range(0, length, self._piece):
            self._read([prefix[begin : begin + self._piece]], cache, begin, 1)
        return Root(cache, length)

    def _long(self, request: Request, root: Root | None, lead: int) -> Iterator[Scores]:
        """Rows arrive in the chunks of a scorer that has no pieces, since they come in lockstep."""
        import torch

        sizes = list(cuts(len(request.ids) - 1 - max(lead - 1, 0), request.keep))
        start = len(request.ids) - request.keep - lead
        waiting: list[torch.Tensor] = []
        for (rows,) in self._pieces([request], root):
            waiting.append(rows)
            while sizes and sum(map(len, waiting)) >= sizes[0]:
                chunk, rest = torch.cat(waiting).tensor_split([sizes.pop(0)])
                yield Scores(request.index, start, chunk)
                start, waiting = start + len(chunk), [rest]

    def _short(self, requests: Sequence[Request], root: Root | None, lead: int) -> Iterator[Scores]:
        import torch

        done: dict[int, Scores] = {}
        for members in self._batches(requests, root):
            found = list(zip(*self._pieces(members, root), strict=True))
            for member, rows in zip(members, found, strict=True):
                start = len(member.ids) - member.keep - lead
                done[member.index] = Scores(member.index, start, torch.cat(rows))
        for request in requests:
            yield done.pop(request.index)

    def _batches(self, requests: Sequence[Request], root: Root | None) -> Iterator[list[Request]]:
        """Requests of like length together, bounded by a pass's tokens and rows, and by caches."""
        read = 0 if root is None else root.length
        batch: list[Request] = []
        for request in sorted(requests, key=lambda each: len(each.ids)):
            width = min(self._piece, len(request.ids) - read)
            room = min(self._max_tokens, self._max_rows) // width
            room = min(room, _HELD_PASSES * self._max_tokens // len(request.ids))
            if batch and len(batch) >= room:
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def _pieces(
        self, members: Sequence[Request], root: Root | None
    ) -> Iterator[list[torch.Tensor]]:
        """Piece after piece: each member's wanted log-probabilities in it, `(rows, vocab)`."""
        cache, first = self._begun(len(members), root)
        end = max(len(member.ids) for member in members) - 1
        for begin in range(first, end, self._piece):
            stop = min(begin + self._piece, end)
            if stop == end:
                if begin == first and root is None:
                    cache = None  # one pass reads all
                else:
                    _kv_cache.finish(cache)
            # Inputs whose rows are wanted: a row comes from the token before it.
            wanted = [(len(m.ids) - 1 - m.keep, len(m.ids) - 1) for m in members]
            spans = [(max(a, begin), min(b, stop)) for a, b in wanted]
            keep = max((stop - a for a, b in spans if a < b), default=1)
            pieces = [member.ids[begin : min(stop, len(member.ids) - 1)] for member in members]
            logits = self._read(pieces, cache, begin, keep)
            if begin > 0:
                self._used.require("scoring", cache)
            self._used.add(sum(b - a for a, b in spans if a < b), before=begin > 0)
            offset = stop - keep
            yield [
                normalized(logits[row, max(a - offset, 0) : max(b - offset, 0)])
                for row, (a, b) in enumerate(spans)
            ]

    def _begun(self, rows: int, root: Root | None) -> tuple[Any, int]:
        """A cache for so many rows, and how many tokens it holds."""
        import torch

        if root is None:
            return _kv_cache.for_scoring(self._model, self._quantization), 0
        index = torch.zeros(rows, dtype=torch.long, device=self._device)
        return _kv_cache.spread(root.cache, index), root.length

    def _read(
        self, pieces: Sequence[Sequence[int]], cache: Any, begin: int, keep: int
    ) -> torch.Tensor:
        """Logits `(rows, keep, vocab)` of the last columns; shorter pieces are padded behind.

        No mask is needed: tokens see what lies before them, and padding lies behind.
        """
        import torch

        width = max(len(piece) for piece in pieces)
        ids = [[*piece, *[self._pad] * (width - len(piece))] for piece in pieces]
        positions = torch.arange(begin, begin + width, device=self._device)
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor(ids, device=self._device),
                position_ids=positions.expand(len(ids), -1),
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=keep,
            )
        logits: torch.Tensor = output.logits
        return logits
