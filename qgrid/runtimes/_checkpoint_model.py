"""A checkpoint as a torch model in the dtype and with the kernel that a cell asks for."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import models, registry
from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.device import compute_threads
from qgrid.libraries import gptq_kernels
from qgrid.lora import adapter_fit, adapters, merging
from qgrid.runtimes import _linears, _storage

if TYPE_CHECKING:
    from qgrid.runtimes.transformers import Options
    from qgrid.types import Cell, Check


@dataclass(frozen=True)
class Loaded:
    """A torch model, how its linear layers came out of the files, and what was checked besides."""

    model: Any
    arrived: Counter[_linears.Stored]
    checks: tuple[Check, ...]


def load(artifact: Path, cell: Cell, dtype: str, options: Options) -> Loaded:
    """The model in memory, ready to compute.

    Raises:
        InvalidEngine: the device or the storage of the weights is not what the cell says.
        Unsupported: the library does not have the kernel for these weights, or PEFT does not keep
            the adapter beside them.
    """
    import torch
    from transformers import GenerationConfig

    _quiet()
    if reason := refused_adapter(cell, artifact / adapters.FOLDER):
        raise Unsupported(reason)
    _require_device(cell)
    if cell.gpu.kind == "cpu":
        torch.set_num_threads(compute_threads(cell.runtime.threads))
    model = _model(artifact, cell, dtype, options)
    _require_attention(model.config, options)
    model.generation_config = GenerationConfig()  # greedy, and nothing that the checkpoint adds
    arrived = _storage.arrived(model, _checkpoint_dtype(artifact))
    require_storage(arrived, cell)
    for module in _storage.linears(model).values():
        _linears.compute_in(module, dtype)
    if not adapters.is_attached(cell.model):
        return Loaded(model, arrived, ())
    product = merging.attach(model, artifact, cell.method.name, dtype)
    return Loaded(model, arrived, (product,))


def _model(artifact: Path, cell: Cell, dtype: str, options: Options) -> Any:
    import torch

    arguments = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": options.attn_implementation,
        "device_map": {"": "cuda:0" if cell.gpu.kind == "cuda" else "cpu"},
        "local_files_only": True,
        **models.load_options(cell.model),
        **gptq_kernels.asked(artifact, options.kernel, dtype, cell.gpu.kind),
    }
    try:
        return registry.loader(cell.method)(artifact, arguments)
    except (ValueError, ImportError, NotImplementedError) as error:
        if options.kernel == gptq_kernels.AUTO:
            raise
        first = str(error).strip().partition("\n")[0]
        raise Unsupported(
            f"`runtime.kernel={options.kernel}` cannot be had for these weights here: {first}"
        ) from error


def refused_adapter(cell: Cell, folder: Path | None = None) -> str | None:
    """Why the cell's adapter cannot be kept beside what its method stores; imports no torch.

    `folder` holds the adapter; without one it is looked for, and None if it is not on this machine.
    """
    made, beside = registry.support(cell.method).produces[cell.bits], _linears.adapted(dora=True)
    if not adapters.is_attached(cell.model) or made in beside:
        return None
    found = adapters.located(cell.model) if folder is None else folder
    if found is None or not adapter_fit.read(found).config.get("use_dora"):
        return None
    return (
        f"`model.adapter={cell.model.adapter}` has `use_dora=true`, which PEFT computes beside "
        f"{', '.join(beside)} alone, not beside `{made}`; use `model.adapter_mode=merged`"
    )


def require_storage(arrived: Mapping[_linears.Stored, int], cell: Cell) -> None:
    """Compare how the linears arrived with what the cell asks for.

    Raises:
        InvalidEngine: a quantized cell without quantized linears, another width, or the reverse.
    """
    quantized = {each: count for each, count in arrived.items() if 0 < each.bits < 16}
    seen = ", ".join(f"{count} x {each.format}" for each, count in arrived.items())
    if cell.bits >= 16 and quantized:
        raise InvalidEngine(f"16-bit weights were asked for, but the engine holds {seen}")
    if cell.bits < 16 and not any(each.bits == cell.bits for each in quantized):
        raise InvalidEngine(
            f"method `{cell.method.name}` with `bits={cell.bits}` was asked for, "
            f"but the engine holds {seen}"
        )


def _checkpoint_dtype(artifact: Path) -> str | None:
    """The dtype in which the files hold what is not quantized."""
    config = json.loads((artifact / "config.json").read_text())
    parts = (config.get("text_config", {}), config)
    named = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    return next((str(each) for each in named if each is not None), None)


def _quiet() -> None:
    """Silence what libraries print at every load or at every layer of every forward pass."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _require_device(cell: Cell) -> None:
    import torch

    if cell.gpu.kind == "cuda" and not torch.cuda.is_available():
        raise InvalidEngine(f"`gpu={cell.gpu.name}` is a CUDA device, but torch finds none here")


def _require_attention(config: Any, options: Options) -> None:
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and options.attn_implementation == "sdpa":
        raise InvalidEngine(
            "the model caps its attention logits, which `runtime.attn_implementation=sdpa` leaves "
            "out; set `runtime.attn_implementation=eager`"
        )
