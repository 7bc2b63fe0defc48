"""Small GGUF files of Llama's layout: random weights, or only a header before a hole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """A Llama-like decoder."""

    layers: int = 2
    hidden: int = 256
    intermediate: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 320
    tied: bool = True

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of every matrix."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "attn_q": (query, self.hidden),
            "attn_k": (key, self.hidden),
            "attn_v": (key, self.hidden),
            "attn_output": (self.hidden, query),
            "ffn_gate": (self.intermediate, self.hidden),
            "ffn_up": (self.intermediate, self.hidden),
            "ffn_down": (self.hidden, self.intermediate),
        }
        found = {"token_embd.weight": (self.vocab, self.hidden)}
        if not self.tied:
            found["output.weight"] = (self.vocab, self.hidden)
        for number in range(self.layers):
            found |= {f"blk.{number}.{name}.weight": shape for name, shape in layer.items()}
        return found

    def linears(self) -> dict[str, int]:
        """Columns of the decoder's linear layers."""
        return {n: shape[1] for n, shape in self.matrices().items() if n.startswith("blk.")}


def write(path: Path, sizes: Sizes, seed: int | None = 0) -> None:
    """A GGUF file in F16; with `seed` None all weights are a hole of zeros that takes no disk."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(sizes.vocab)
    writer.add_context_length(512)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(1)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(seed)
    total = 0
    for name, shape in sizes.matrices().items():
        if seed is None:
            size = 2 * shape[0] * shape[1]
            total += -(-size // 32) * 32
            writer.add_tensor_info(name, shape, np.dtype(np.float16), size)
        else:
            weights = random.normal(0, 0.05, shape).astype(np.float16)
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if seed is None:
        writer.write_ti_data_to_file()
    else:
        writer.write_tensors_to_file()
    writer.close()
    if seed is None:
        with path.open("r+b") as file:
            size = path.stat().st_size
            file.truncate(-(-size // 32) * 32 + total)
