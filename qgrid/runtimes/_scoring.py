"""Scoring with a transformers model: padding, positions, shared beginnings, bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qgrid.contracts import Scores
from qgrid.runtimes._batches import (
    CHUNK_ROWS,
    Family,
    Request,
    batches,
    common_length,
    families,
    require_rows,
    runs,
    within_rows,
)

if TYPE_CHECKING:
    import torch

PREFILL_TOKENS = 4096
MIN_PREFIX = 64  # a shorter beginning is not worth a forward pass of its own
GROUP_BYTES = 256 * 2**20  # log-probabilities that wait for their turn


@dataclass(frozen=True)
class Context:
    """What a batch has read so far.

    `mask` is `(batch, slots)`, 1 where a slot of the cache holds a token; `lengths` is `(batch,)`,
    the number of those tokens, which is the position of the next one.
    """

    cache: Any
    mask: torch.Tensor
    lengths: torch.Tensor


class Scorer:
    """Computes `Engine.score` for a causal language model on one device.

    `max_tokens` bounds the tokens of one padded forward pass. `shares` is false for models whose
    attention counts slots (sliding windows): a gap of padding inside the cache would shift them.
    """

    def __init__(self, model: Any, max_tokens: int, shares: bool, pad: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._shares = shares
        self._pad = pad
        self._device = next(model.parameters()).device
        vocab = model.get_output_embeddings().out_features
        self._max_rows = max(CHUNK_ROWS, GROUP_BYTES // (4 * vocab))

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int]
    ) -> Iterator[Scores]:
        """See `Engine.score`."""
        # With the last token of the prefix in front, every wanted row comes from a real token.
        lead, head = tuple(prefix[-1:]), tuple(prefix[:-1])
        if not self._shares:
            lead, head = (*head, *lead), ()
        requests = [
            Request(i, (*lead, *ids), count)
            for i, (ids, count) in enumerate(zip(sequences, keep, strict=True))
        ]
        for request in requests:
            require_rows(request, len(lead))
        root = self._read(head) if head else None
        for group in runs(requests):
            if group[0].keep > CHUNK_ROWS:
                yield from self._long(group[0], root, len(lead))
            else:
                for part in within_rows(group, self._max_rows):
                    yield from self._short(part, root, len(lead))

    def prompt(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Padded prompts as `model.generate` takes them; a long common beginning is read once."""
        import torch

        ordered = sorted(tuple(prompt) for prompt in prompts)
        shared = common_length(ordered[0], ordered[-1])  # these two differ earliest
        head = ordered[0][: min(shared, min(map(len, ordered)) - 1)]
        if not self._shares or len(prompts) < 2 or len(head) < MIN_PREFIX:
            ids, mask = padded(prompts, self._pad, self._device)
            return {"input_ids": ids, "attention_mask": mask}
        context = self._spread(self._read(head), [0] * len(prompts))
        ids, mask = padded([prompt[len(head) :] for prompt in prompts], self._pad, self._device)
        lead = torch.tensor([head] * len(prompts), device=self._device)
        return {
            "input_ids": torch.cat([lead, ids], 1),
            "attention_mask": torch.cat([context.mask, mask], 1),
            "past_key_values": context.cache,
        }

    def _read(self, ids: Sequence[int]) -> Context:
        """Prefill one sequence in pieces."""
        context = None
        for begin in range(0, len(ids), PREFILL_TOKENS):
            _, context = self._extend(context, [ids[begin : begin + PREFILL_TOKENS]], 1)
        assert context is not None
        return context

    def _long(self, request: Request, root: Context | None, lead: int) -> Iterator[Scores]:
        inputs = request.ids[:-1]
        first = len(inputs) - request.keep  # the first input whose row is wanted
        context = root and self._spread(root, [0])
        for begin in range(0, len(inputs), CHUNK_ROWS):
            piece = inputs[begin : begin + CHUNK_ROWS]
            rows = min(len(piece), begin + len(piece) - first)
            logits, context = self._extend(context, [piece], max(rows, 1))
            if rows > 0:
                start = begin + len(piece) - rows + 1 - lead
                yield Scores(request.index, start, normalized(logits[0]))

    def _short(
        self, requests: Sequence[Request], root: Context | None, lead: int
    ) -> Iterator[Scores]:
        found = families(requests) if self._shares else [Family((), (r,)) for r in requests]
        done: dict[int, Scores] = {}
        for batch in batches(found, self._max_tokens, self._max_rows):
            members = [member for family in batch for member in family.members]
            for member, logprobs in zip(members, self._batch(batch, root), strict=True):
                start = len(member.ids) - member.keep - lead
                done[member.index] = Scores(member.index, start, logprobs[-member.keep :])
        for request in requests:
            yield done.pop(request.index)

    def _batch(self, batch: Sequence[Family], root: Context | None) -> torch.Tensor:
        """Log-probabilities `(members, widest keep, vocab)`; a member's rows are the last ones."""
        context = root and self._spread(root, [0] * len(batch))
        if batch[0].stem:
            _, context = self._extend(context, [family.stem for family in batch], 1)
        if context is not None and any(len(family.members) > 1 for family in batch):
            rows = [row for row, family in enumerate(batch) for _ in family.members]
            context = self._spread(context, rows)
        tails = [m.ids[len(f.stem) : -1] for f in batch for m in f.members]
        keep = max(member.keep for family in batch for member in family.members)
        logits, _ = self._extend(context, tails, keep, last=True)
        return normalized(logits)

    def _spread(self, context: Context, rows: Sequence[int]) -> Context:
        """The context with its rows chosen and repeated; the original stays as it is."""
        import torch
        from transformers import DynamicCache

        index = torch.tensor(rows, device=self._device)
        cache = DynamicCache()
        for number, layer in enumerate(context.cache.layers):
            cache.update(layer.keys[index], layer.values[index], number)
        return Context(cache, context.mask[index], context.lengths[index])

    def _extend(
        self, context: Context | None, rows: Sequence[Sequence[int]], keep: int, last: bool = False
    ) -> tuple[torch.Tensor, Context | None]:
        """Read `rows` after the context: logits `(batch, keep, vocab)` of the last tokens.

        The cache of `context` grows in place. With `last` nothing follows, and no cache is made.
        """
        import torch
        from transformers import DynamicCache

        ids, fresh = padded(rows, self._pad, self._device)
        seen = context.lengths if context else torch.zeros(len(rows), dtype=torch.long)
        seen = seen.to(self._device)
        positions = (seen[:, None] + fresh.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([context.mask, fresh], 1) if context else fresh
        cache = context.cache if context else (None if last else DynamicCache())
        with torch.inference_mode():
            output = self._model(
                input_ids=ids,
                attention_mask=None if bool(mask.all()) else mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=min(keep, ids.shape[1]),
            )
        after = None if last else Context(cache, mask, seen + fresh.sum(1))
        return output.logits, after


def slides(config: Any) -> bool:
    """Whether a layer of the (text) model attends to something else than all tokens before it."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    return any(kind != "full_attention" for kind in kinds) or bool(
        not kinds and getattr(config, "sliding_window", None)
    )


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `(batch, longest)`, padded on the left."""
    import torch

    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def normalized(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in fp32."""
    import torch

    with torch.inference_mode():
        return torch.log_softmax(logits.float(), dim=-1)
