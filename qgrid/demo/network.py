"""The Llama architecture on rows of mixed length: the forward pass that training uses.

Parameter names and arithmetic equal `transformers.LlamaForCausalLM` (a test compares the logits).
Rows are laid out flat, grouped by padded length, so that the linear layers see one matrix and
attention needs no mask: one document is one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

LONGEST_PLAIN = 256  # tokens; longer rows use the fused attention


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, in elements."""

    vocab: int = 1536
    hidden: int = 256
    inner: int = 768
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    positions: int = 4096
    rope_theta: float = 10000.0
    eps: float = 1e-5


@dataclass(frozen=True)
class Segment:
    """`rows` documents, each padded to `length` tokens, contiguous in the flat batch."""

    rows: int
    length: int


def rotary(positions: Tensor, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [tokens, 1, head_dim] for flat positions [tokens]."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = positions.float()[:, None] * shape.rope_theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to [tokens, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, [rows, heads, length, head_dim]; short rows are faster without a kernel."""
    length = q.shape[2]
    if length > LONGEST_PLAIN:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    future = torch.full((length, length), float("-inf"), dtype=scores.dtype).triu(1)
    return torch.softmax(scores + future, dim=-1, dtype=scores.dtype) @ v


class Norm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, size] to the same shape and dtype."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention inside each row."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, wide, bias=False)
        self.k_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.v_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], segments: list[Segment]) -> Tensor:
        """[tokens, hidden] to [tokens, hidden]."""
        shape = self.shape
        q = rotate(self.q_proj(x).view(-1, shape.heads, shape.head_dim), *tables)
        k = rotate(self.k_proj(x).view(-1, shape.kv_heads, shape.head_dim), *tables)
        v = self.v_proj(x).view(-1, shape.kv_heads, shape.head_dim)
        repeats = shape.heads // shape.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        sizes = [segment.rows * segment.length for segment in segments]
        split = (torch.split(t, sizes) for t in (q, k, v))
        parts = zip(*split, segments, strict=True)
        mixed = [self._inside_rows(*part) for part in parts]
        return torch.as_tensor(self.o_proj(torch.cat(mixed)))

    def _inside_rows(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment) -> Tensor:
        """Attention of one segment: flat [rows * length, heads, head_dim] to [.., hidden]."""
        grid = (segment.rows, segment.length, self.shape.heads, self.shape.head_dim)
        q, k, v = (t.view(grid).transpose(1, 2) for t in (q, k, v))
        mixed = attend(q, k, v)
        return mixed.transpose(1, 2).reshape(segment.rows * segment.length, -1)


class Feed(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] to [tokens, hidden]."""
        return torch.as_tensor(self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)
        self.mlp = Feed(shape)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], segments: list[Segment]) -> Tensor:
        """[tokens, hidden] to [tokens, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), tables, segments)
        return torch.as_tensor(x + self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)

    def forward(self, ids: Tensor, positions: Tensor, segments: list[Segment]) -> Tensor:
        """Token ids [tokens] and positions [tokens] to hidden states [tokens, hidden]."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        x = self.embed_tokens(ids)
        x = x if dtype is None else x.to(dtype)
        tables = rotary(positions, self.shape, x.dtype)
        for layer in self.layers:
            x = layer(x, tables, segments)
        return torch.as_tensor(self.norm(x))


class Network(nn.Module):
    """The language model; the output matrix is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Decoder(shape)

    def forward(self, ids: Tensor, positions: Tensor, segments: list[Segment]) -> Tensor:
        """Hidden states [tokens, hidden] of a flat batch."""
        return torch.as_tensor(self.model(ids, positions, segments))

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] to [tokens, vocab]."""
        return functional.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))
