"""vLLM on CPU and CUDA: in this process for quality, behind its own OpenAI server for speed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import registry
from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.runtimes import _vllm_formats as formats
from qgrid.runtimes import _vllm_settings as settings
from qgrid.runtimes._vllm_settings import Options
from qgrid.types import RuntimeSupport

if TYPE_CHECKING:
    from qgrid.runtimes._vllm_engine import Vllm
    from qgrid.runtimes._vllm_process import VllmServer
    from qgrid.types import Cell

__all__ = [
    "LOADS",
    "Options",
    "deterministic",
    "kv_bits",
    "load",
    "quality_options",
    "refusal",
    "serve",
]

LOADS = RuntimeSupport(
    loads={"cpu": formats.FORMATS, "cuda": formats.FORMATS},
    kv_cache={"cpu": tuple(settings.KV_TYPES), "cuda": tuple(settings.KV_TYPES)},
    packages=("vllm", "torch", "transformers", "compressed-tensors"),
    capability="sm_75",  # vLLM's installation guide
    environment="vllm",
)


def deterministic(cell: Cell) -> bool:
    """As tried on a CPU; its CUDA kernels compute a row by what else is in the batch."""
    return cell.gpu.kind == "cpu"


def refusal(cell: Cell) -> str | None:
    """Why vLLM cannot run this cell on this device, as tried with the locked version."""
    format_ = registry.support(cell.method).produces.get(cell.bits, "")
    return (
        formats.refused_dtype(cell, format_)
        or formats.refused_format(cell, format_)
        or formats.refused_scheme(cell, format_)
        or formats.refused_kernel(cell, format_)
    )


def kv_bits(cell: Cell) -> float:
    """Bits of a stored key or value."""
    return 8 if cell.kv_cache.name == "fp8" else 16


def quality_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that can change a number of quality: the kernel, and where long prompts are cut."""
    return {name: options[name] for name in ("kernel", "max_num_batched_tokens")}


def load(artifact: Path, cell: Cell, dtype: str) -> Vllm:
    """Load the checkpoint in `artifact` into this process, computing in `dtype`.

    On several GPUs each holds a part in a worker of its own; the engine is still in this process.

    Raises:
        InvalidEngine: the device is not what the cell says.
        Unsupported: vLLM has no kernel for how the checkpoint is stored.
    """
    from qgrid.runtimes import _vllm_engine

    _require(artifact, cell)
    _vllm_engine.prepare(cell)
    with formats.explained():
        return _vllm_engine.Vllm(artifact, cell, dtype)


def serve(artifact: Path, cell: Cell, dtype: str) -> VllmServer:
    """Start vLLM's OpenAI server for the checkpoint in `artifact` on a port of this machine.

    Raises:
        InvalidEngine: the device is not what the cell says.
        Unsupported: vLLM has no kernel for how the checkpoint is stored.
        ServerFailed: it ended or was not ready in time; the message holds its last words.
    """
    from qgrid.runtimes import _vllm_process

    _require(artifact, cell)
    with formats.explained():
        return _vllm_process.VllmServer(artifact, cell, dtype)


def _require(artifact: Path, cell: Cell) -> None:
    """The device, and what the checkpoint itself says about how it is stored."""
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    objection = formats.objection(config.get("quantization_config", {}), cell.gpu.kind)
    if objection is not None:
        raise Unsupported(objection)
    if cell.gpu.kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InvalidEngine(
                f"`gpu={cell.gpu.name}` is a CUDA device, but torch finds none here"
            )
