"""GGUF files of random Llamas, written tensor by tensor: no converter, no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qgrid.gguf import log

F16, Q4_0, Q8_0, Q4_K_M = 1, 2, 7, 15  # llama.cpp's numbers of file types


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; key and value heads are `heads // 2`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    positions: int = 4096

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_heads(self) -> int:
        return self.heads // 2

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return (
            self.layers * (attention + 3 * self.hidden * self.intermediate)
            + self.vocab * self.hidden
        )


SMALL = Shape(hidden=256, intermediate=512, layers=2, heads=4, vocab=512)
LARGE = Shape(hidden=1024, intermediate=2816, layers=12, heads=16, vocab=8192)  # 150 M


def write(
    path: Path,
    shape: Shape,
    seed: int = 0,
    scale: float = 0.08,
    table: float = 0.08,
    head: bool = False,
) -> None:
    """Write an F16 file with tied embeddings, or with a `head` of its own.

    `scale` and `table` are the standard deviations of the blocks' matrices and of the embedding:
    the wider the table, the more decided the predictions; the wider the blocks, the more a small
    error grows from layer to layer.
    """
    import gguf

    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, width: float = scale) -> npt.NDArray[np.float16]:
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        return (width * values).astype(np.float16)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(F16)
    writer.add_tokenizer_model("none")
    writer.add_tensor("token_embd.weight", matrix(shape.vocab, shape.hidden, table))
    if head:
        writer.add_tensor("output.weight", matrix(shape.vocab, shape.hidden, table))
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, dtype=np.float32))
    width = shape.kv_heads * shape.head_dim
    sizes = {
        "attn_q": (shape.hidden, shape.hidden),
        "attn_k": (width, shape.hidden),
        "attn_v": (width, shape.hidden),
        "attn_output": (shape.hidden, shape.hidden),
        "ffn_gate": (shape.intermediate, shape.hidden),
        "ffn_up": (shape.intermediate, shape.hidden),
        "ffn_down": (shape.hidden, shape.intermediate),
    }
    for layer in range(shape.layers):
        for name in ("attn_norm", "ffn_norm"):
            ones = np.ones(shape.hidden, dtype=np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
        for name, (rows, columns) in sizes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix(rows, columns))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, file_type: int, threads: int = 1) -> None:
    """Another type of the file, by the library alone."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = file_type, threads
    with log.captured() as said:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), options)
    if code:
        raise said.error(f"quantize {source.name}")
