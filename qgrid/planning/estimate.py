"""Memory by arithmetic alone: what a cell will need, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
LARGE = (4096, 4096)  # rows and columns of the layer that sizes are planned with


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder. `num_parameters` is the true count where the weights are at hand."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    num_parameters: int | None = None
    positions: int | None = None  # the longest sequence that the model was made for

    @property
    def linear_weights(self) -> int:
        """Weights of the decoder's linear layers: what quantization shrinks."""
        if self.num_parameters is not None:
            return self.num_parameters - self.other_weights
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def other_weights(self) -> int:
        """Embedding, output head and norms: 16 bits in every weight-only method."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + self.hidden * (2 * self.layers + 1)

    @property
    def total_weights(self) -> int:
        """Weights of the whole model."""
        return self.linear_weights + self.other_weights

    def weight_bytes(self, linear_bits_per_weight: float) -> float:
        """Bytes of all weights; source: size = (linear * bpw + rest * 16) / 8."""
        return (self.linear_weights * linear_bits_per_weight + self.other_weights * 16) / 8

    def kv_bytes_per_token(self, kv_bits: float = 16) -> float:
        """Bytes of keys and values that one token takes: 2 * layers * kv_heads * head_dim."""
        return 2 * self.layers * self.kv_heads * self.head_dim * kv_bits / 8


def predict(
    weight_bytes: float,
    architecture: Architecture,
    kv_bits: float,
    context: int,
    concurrency: int,
) -> dict[str, float]:
    """Planned bytes of a cell: weights, KV cache at full context, and their sum."""
    per_token = architecture.kv_bytes_per_token(kv_bits)
    cache = per_token * context * concurrency
    return {
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": per_token,
        "kv_bytes": cache,
        "total_bytes": weight_bytes + cache,
    }
