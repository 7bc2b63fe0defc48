"""A GGUF file in llama.cpp: its tokenizer and its logits, with the library's log captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.gguf import log

if TYPE_CHECKING:
    import numpy as np

_BATCH = 128  # rows of logits that are held at once


@contextlib.contextmanager
def model(file: Path, vocabulary_only: bool = False) -> Iterator[Any]:
    """The model of a file on the CPU, without memory mapping.

    Raises:
        LlamaError: llama.cpp cannot load it.
    """
    import llama_cpp

    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = vocabulary_only
    options.n_gpu_layers = 0
    options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    with log.captured() as said:
        found = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not found:
            raise said.error(f"load {file.name}")
        try:
            yield found
        finally:
            llama_cpp.llama_model_free(found)


def vocab(loaded: Any) -> Any:
    """The vocabulary of a loaded model."""
    import llama_cpp

    return llama_cpp.llama_model_get_vocab(loaded)


def special_texts(words: Any, ids: Sequence[int]) -> list[str]:
    """The texts of those of `ids` that llama.cpp takes for special tokens."""
    import llama_cpp

    control = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
    found = [i for i in ids if llama_cpp.llama_vocab_get_attr(words, i) & control]
    return [llama_cpp.llama_vocab_get_text(words, i).decode("utf-8", "replace") for i in found]


def tokenize(words: Any, text: str, add_special: bool) -> list[int]:
    """Ids of a text by llama.cpp; the texts of special tokens in it become those tokens."""
    import llama_cpp

    raw = text.encode()
    size = len(raw) + 3  # every byte one token, BOS, EOS and a space before
    buffer = (llama_cpp.llama_token * size)()
    count = llama_cpp.llama_tokenize(words, raw, len(raw), buffer, size, add_special, True)
    if count < 0:
        raise log.LlamaError(f"llama.cpp makes more than {size} tokens of {len(raw)} bytes")
    return list(buffer[:count])


def logits(loaded: Any, ids: Sequence[int], threads: int) -> Iterator[np.ndarray[Any, Any]]:
    """Logits `(rows, vocab)` of all tokens of one sequence, fp32, a batch of rows at a time.

    Raises:
        LlamaError: the context cannot be made or a batch cannot be computed.
    """
    import llama_cpp

    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = len(ids), _BATCH, _BATCH
    options.n_seq_max = 1
    options.n_threads = options.n_threads_batch = threads
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama_cpp.llama_init_from_model(loaded, options)
    if not context:
        raise log.LlamaError(f"llama.cpp cannot make a context of {len(ids)} tokens")
    batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
    try:
        for start in range(0, len(ids), _BATCH):
            yield _decode(loaded, context, batch, ids[start : start + _BATCH], start)
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)


def _decode(
    loaded: Any, context: Any, batch: Any, ids: Sequence[int], start: int
) -> np.ndarray[Any, Any]:
    import llama_cpp
    import numpy as np

    batch.n_tokens = len(ids)
    for row, token in enumerate(ids):
        batch.token[row], batch.pos[row] = token, start + row
        batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, 0, True
    if llama_cpp.llama_decode(context, batch):
        raise log.LlamaError(f"llama.cpp cannot compute the tokens from {start}")
    columns = llama_cpp.llama_vocab_n_tokens(vocab(loaded))
    found = llama_cpp.llama_get_logits(context)
    return np.ctypeslib.as_array(found, (len(ids), columns)).copy()
