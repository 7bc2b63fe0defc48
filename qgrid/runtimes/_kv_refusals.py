"""Which quantized KV caches transformers cannot give a model, told before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qgrid import models
from qgrid.runtimes._kv_cache import WIDTHS, wanted

if TYPE_CHECKING:
    from qgrid.runtimes._kv_cache import Quantization
    from qgrid.types import Cell

_PACKAGES = {"hqq": "hqq", "quanto": "optimum-quanto"}


def packages(cell: Cell) -> tuple[str, ...]:
    """The distribution that rounds the cell's keys and values, if they are rounded."""
    asked = wanted(cell)
    return () if asked is None else (_PACKAGES[asked.backend],)


def refusal(cell: Cell) -> str | None:
    """Why this cache cannot be had for the cell's model; None if it can, or the model is not here.

    Imports no torch.
    """
    asked = wanted(cell)
    if asked is None:
        return None
    return _refused_options(cell, asked) or _refused_package(asked) or _refused_model(cell, asked)


def _refused_options(cell: Cell, asked: Quantization) -> str | None:
    has = WIDTHS[asked.backend]
    if asked.bits not in has:
        others = " or ".join(
            f"`runtime.cache_backend={name}`" for name in WIDTHS if asked.bits in WIDTHS[name]
        )
        return (
            f"`runtime.cache_backend={asked.backend}` has no `kv_cache={cell.kv_cache.name}` "
            f"(has: {', '.join(f'int{bits}' for bits in has)}); use {others}"
        )
    if asked.search and asked.backend != "hqq":
        return (
            f"`runtime.cache_search=true` is hqq's, and `runtime.cache_backend={asked.backend}` "
            "has no search; leave it out or use `runtime.cache_backend=hqq`"
        )
    if asked.residual_length % 2:
        return (
            f"`runtime.residual_length={asked.residual_length}` should be even: text is scored in "
            "pieces of half of it"
        )
    return None


def _refused_package(asked: Quantization) -> str | None:
    from qgrid.planning.facts import missing

    absent = missing((_PACKAGES[asked.backend],))
    return None if absent is None else f"`runtime.cache_backend={asked.backend}` {absent}"


def _refused_model(cell: Cell, asked: Quantization) -> str | None:
    folder = models.known(cell.model)
    if folder is None:
        return None
    if _slides(folder):
        return sliding(cell)
    sizes = models.architecture(folder)
    return _refused_group(cell, asked, sizes["kv_heads"], sizes["head_dim"])


def sliding(cell: Cell) -> str:
    """One sentence about a model whose layers do not all attend to all tokens before."""
    return (
        f"`kv_cache={cell.kv_cache.name}` is not there for model `{cell.model.name}`, whose "
        "attention slides: transformers quantizes caches of full attention only; use "
        "`kv_cache=auto16`"
    )


def _slides(folder: Path) -> bool:
    """Whether some layer attends to less than all tokens before, by `config.json` alone."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    if kinds := text.get("layer_types"):
        return any(kind != "full_attention" for kind in kinds)
    return bool(text.get("sliding_window")) and text.get("use_sliding_window") is not False


def _refused_group(cell: Cell, asked: Quantization, heads: int, dim: int) -> str | None:
    """Groups must fill a head, and there must be as many of one token as the library takes."""
    fitting = [size for size in (128, 64, 32, 16, 8) if _packs(asked, size, heads, dim)]
    if _packs(asked, asked.group_size, heads, dim):
        return None
    ways = f"set `runtime.cache_group_size={fitting[0]}`" if fitting else "use `kv_cache=auto16`"
    step = _groups_together(asked)
    number = f"{step} groups or a multiple" if asked.backend == "hqq" else "more than one group"
    return (
        f"`runtime.cache_group_size={asked.group_size}` does not go with `{asked.backend}` at "
        f"{asked.bits} bits and the {heads} key-value heads of {dim} of model "
        f"`{cell.model.name}`: it should divide {dim}, and leave a token {number}; {ways}"
    )


def _packs(asked: Quantization, size: int, heads: int, dim: int) -> bool:
    """Whether groups of a size can be stored, of any number of tokens.

    hqq 0.2.8 packs `8 / bits` groups together and fails on others. optimum-quanto 0.2.7 gives a
    tensor of a single group a scale for each number, and rounds nothing.
    """
    groups, left = heads * dim // size, dim % size
    enough = asked.backend == "hqq" or groups > 1
    return left == 0 and enough and groups % _groups_together(asked) == 0


def _groups_together(asked: Quantization) -> int:
    return 8 // asked.bits if asked.backend == "hqq" else 1
