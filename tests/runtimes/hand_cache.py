"""A quantized KV cache written by hand, and decoding through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from qgrid.runtimes._kv_cache import Quantization


class ByHand(DynamicLayer):  # type: ignore[misc]
    """Keeps numbers as they come back from rounding between a group's least and greatest.

    What comes first is rounded at once; what follows when it is `residual` tokens, and all before
    it once more.
    """

    def __init__(self, bits: int, group: int, residual: int) -> None:
        super().__init__()
        self.bits, self.group, self.residual = bits, group, residual
        self.past: tuple[torch.Tensor, ...] = ()
        self.fresh: list[tuple[torch.Tensor, ...]] = []

    def update(self, *new: Any, **_: Any) -> Any:
        if not self.past:
            self.past = tuple(map(self.rounded, new[:2]))
            return new[:2]
        self.fresh.append(new[:2])
        full = tuple(torch.cat(parts, -2) for parts in zip(self.past, *self.fresh, strict=True))
        if sum(keys.shape[-2] for keys, _ in self.fresh) >= self.residual:
            self.past, self.fresh = tuple(map(self.rounded, full)), []
        return full

    def rounded(self, numbers: torch.Tensor) -> torch.Tensor:
        groups = numbers.reshape(-1, self.group)
        least, greatest = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        step = (greatest - least) / (2**self.bits - 1)
        codes = torch.round((groups - least) / step)
        return torch.add(least, step * codes).reshape(numbers.shape)

    def get_seq_length(self) -> int:
        return sum(each[0].shape[-2] for each in (self.past, *self.fresh) if each)


def decoded(model: Any, asked: Quantization, ids: Sequence[int], first: int) -> torch.Tensor:
    """Log-probabilities after every token: `first` tokens at once, the others one by one."""
    layers = [ByHand(asked.bits, asked.group_size, asked.residual_length) for _ in range(2)]
    cache = Cache(layers=layers)
    parts = [ids[:first], *([token] for token in ids[first:])]
    with torch.inference_mode():
        rows = [model(torch.tensor([part]), past_key_values=cache).logits[0] for part in parts]
    return torch.log_softmax(torch.cat(rows).float(), -1)
