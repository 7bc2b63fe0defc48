"""From a Hugging Face checkpoint to one GGUF file, tensor by tensor."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import models
from qgrid.contracts import Unsupported
from qgrid.gguf import _decoder, _tensors, vocabulary
from qgrid.gguf._tensors import Dtype
from qgrid.weights import headers

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from qgrid.gguf._decoder import Decoder
    from qgrid.gguf._tensors import Source
    from qgrid.gguf.vocabulary import Vocabulary

_FILE_TYPES: Mapping[Dtype, int] = {"F32": 0, "F16": 1, "BF16": 32}  # llama.cpp's numbers


def convert(source: Path, out: Path, dtype: Dtype) -> None:
    """Write the checkpoint in `source` as the GGUF file `out`.

    Matrices are stored as `dtype`, everything one-dimensional as F32. The file appears under its
    name when it is whole; at most one tensor is in memory at a time.

    Raises:
        Unsupported: something that GGUF or the converter does not know, by name.
        ValueError: a weight is beyond the range of F16.
    """
    decoder, tensors = planned(source, dtype)
    words = vocabulary.read(source, decoder.vocab)
    with _written_aside(out) as aside:
        _write(aside, decoder, words, tensors, dtype)


def planned(source: Path, dtype: Dtype) -> tuple[Decoder, list[Source]]:
    """The decoder of a checkpoint and the tensors of its GGUF file, in order.

    Raises:
        Unsupported: something that the converter does not know, by name.
    """
    decoder, stored = _checked(source)
    return decoder, _tensors.plan(decoder, stored, _name_map(decoder), dtype)


def refusal(source: Path) -> str | None:
    """Why this checkpoint cannot become a GGUF file, from configs, tokenizer files and headers.

    Fast, and without torch; None: nothing speaks against it.
    """
    return _refusal(source, _stamp(source))


def _stamp(source: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells whether a checkpoint is still the one that was looked at."""
    found = ((path.name, path.stat()) for path in models.checkpoint_files(source))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


@functools.cache  # a plan asks for every cell, and a large tokenizer.json takes half a second
def _refusal(source: Path, _: tuple[tuple[str, int, int], ...]) -> str | None:
    try:
        decoder, _places = _checked(source)
        path = source / "tokenizer.json"
        if not path.is_file():
            return _no_tokenizer(source)
        vocabulary.refuse(json.loads(path.read_text(encoding="utf-8")), decoder.vocab)
    except (Unsupported, headers.TornFile) as error:
        return str(error)
    except json.JSONDecodeError as error:
        return f"a JSON file of the checkpoint cannot be read ({error}); get it again"
    return None


def _no_tokenizer(source: Path) -> str | None:
    """Transformers makes a tokenizer of `vocab.json` and `merges.txt` without other packages."""
    if (source / "vocab.json").is_file():
        return None
    return (
        "the checkpoint has no tokenizer.json; write one with `save_pretrained` of its tokenizer "
        "in transformers"
    )


def tensor_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Hugging Face module -> GGUF tensor without `.weight`: decoder linears, embedding, head.

    A tied head has no tensor of its own and is not among them.

    Raises:
        Unsupported: an architecture that the converter does not know.
    """
    decoder = _decoder.read(config)
    modules = ["model.embed_tokens"] + ([] if decoder.tied else ["lm_head"])
    for layer in range(decoder.layers):
        modules += [f"model.layers.{layer}.{name}" for name in _decoder.layer_linears(decoder)]
    known = _name_map(decoder)
    return {module: known[module] for module in modules}


def _checked(source: Path) -> tuple[Decoder, dict[str, _tensors.Place]]:
    """The decoder of a checkpoint and where its tensors lie."""
    decoder = _decoder.read(json.loads((source / "config.json").read_text(encoding="utf-8")))
    stored = _tensors.places(source)
    if not stored:
        raise Unsupported("the checkpoint has no safetensors file; convert it to safetensors")
    _tensors.refuse_other_tensors(decoder, stored)
    return decoder, stored


def _name_map(decoder: Decoder) -> dict[str, str]:
    """Hugging Face module -> GGUF name, for every module that has a tensor."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = {name: number for number, name in MODEL_ARCH_NAMES.items()}[decoder.architecture.name]
    found = get_tensor_name_map(arch, decoder.layers)
    modules = {name.rpartition(".")[0] for name in _decoder.tensors(decoder)}
    names = {module: found.get_name(module) for module in modules}
    return {module: name for module, name in names.items() if name is not None}


def _write(
    path: Path, decoder: Decoder, words: Vocabulary, tensors: list[Source], dtype: Dtype
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, decoder.architecture.name)
    try:
        _add_sizes(writer, decoder)
        writer.add_file_type(_FILE_TYPES[dtype])
        vocabulary.write(words, writer)
        _add_tensors(writer, tensors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_tensors.load(tensor, decoder))
    finally:
        writer.close()


def _add_sizes(writer: GGUFWriter, decoder: Decoder) -> None:
    """The keys of the architecture; each is written even where llama.cpp has a default."""
    writer.add_vocab_size(decoder.vocab)
    writer.add_context_length(decoder.positions)
    writer.add_embedding_length(decoder.hidden)
    writer.add_block_count(decoder.layers)
    writer.add_feed_forward_length(decoder.intermediate)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.kv_heads)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_rope_freq_base(decoder.rope_theta)
    writer.add_layer_norm_rms_eps(decoder.norm_eps)


def _add_tensors(writer: GGUFWriter, tensors: list[Source]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType

    for tensor in tensors:
        count = int(np.prod(tensor.shape))
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),  # ignored: the raw type says it
            count * _tensors.BYTES[tensor.dtype],
            raw_dtype=GGMLQuantizationType[tensor.dtype],
        )


@contextlib.contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A fresh name next to `target` that becomes `target` when the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o644)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
