"""What vLLM is started with: the same arguments for an engine in this process and for a server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat, PositiveInt

from qgrid import models
from qgrid.device import compute_threads

if TYPE_CHECKING:
    from qgrid.types import Cell

GIB = 2**30
KV_TYPES = {"auto16": "auto", "fp8": "fp8_e4m3"}  # KV intent -> vLLM's name
BATCHED_TOKENS = 2048  # of one step of an engine in this process
SEQUENCES = 128  # of one step of an engine in this process
_LEAST_POOL = {"cpu": GIB // 2, "cuda": 4 * GIB}
_ROOM = 1.25  # blocks that are not full, and the one that vLLM keeps empty
# Of `config/kernel.py`: the backends of linear layers that exist for CUDA devices.
CUDA_KERNELS = (
    "cutlass",
    "machete",
    "marlin",
    "exllama",
    "conch",
    "triton",
    "torch",
    "humming",
    "flashinfer_cutlass",
    "deep_gemm",
)

W4A8 = "w4a8"  # the one further kernel of a CPU: 8-bit activations for 4-bit weights


@dataclass(frozen=True)
class Options:
    """Options of this runtime."""

    kernel: str
    kv_cache_gib: PositiveFloat | None
    gpu_memory_utilization: PositiveFloat
    max_num_batched_tokens: PositiveInt | None
    enforce_eager: bool | None


def cores(cell: Cell, served: bool = False) -> tuple[int, ...]:
    """The processors that compute: the first of those that this process may use.

    A server that was not told how many leaves one to its other processes, as vLLM's own does.
    """
    wanted = compute_threads(cell.runtime.threads)
    if served and cell.runtime.threads is None:
        wanted = max(1, wanted - 1)
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(wanted))
    return tuple(sorted(os.sched_getaffinity(0)))[:wanted]


def environment(cell: Cell, served: bool = False) -> dict[str, str]:
    """Variables that vLLM reads: no usage reports, no downloads, the cores, 4-bit activations."""
    options = Options(**cell.runtime.options)
    own = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1" if cell.gpu.kind == "cpu" else "0",
    }
    if cell.gpu.kind == "cpu":
        own["VLLM_CPU_OMP_THREADS_BIND"] = _binding(cores(cell, served), parallel(cell))
        own["VLLM_CPU_INT4_W4A8"] = str(int(options.kernel == W4A8))
    return own


def parallel(cell: Cell) -> int:
    """Processes that the model is split over: one a GPU."""
    return cell.gpu.count if cell.gpu.kind == "cuda" else 1


def _binding(cores: Sequence[int], parts: int) -> str:
    """Equal shares of the processors, as vLLM reads them."""
    share = len(cores) // parts
    shares = (cores[i * share : (i + 1) * share] for i in range(parts))
    return "|".join(",".join(map(str, each)) for each in shares)


def arguments(artifact: Path, cell: Cell, dtype: str) -> dict[str, Any]:
    """Fields of vLLM's `EngineArgs` that an engine and a server share."""
    options = Options(**cell.runtime.options)
    found: dict[str, Any] = {
        "model": str(artifact),
        "dtype": dtype,
        "seed": cell.seed,
        "trust_remote_code": cell.model.trust_remote_code,
        "generation_config": "vllm",  # greedy, and nothing that the checkpoint adds
        "kv_cache_dtype": KV_TYPES[cell.kv_cache.name],
        "tensor_parallel_size": parallel(cell),
    }
    if parallel(cell) > 1:
        found["distributed_executor_backend"] = "mp"  # never a cluster's
    if cell.gpu.kind == "cuda" and options.kernel != "auto":
        found["linear_backend"] = options.kernel
    return found


def engine_arguments(artifact: Path, cell: Cell, dtype: str) -> dict[str, Any]:
    """Of an engine in this process: eager, with blocks of shared beginnings kept for scoring."""
    options = Options(**cell.runtime.options)
    tokens = options.max_num_batched_tokens
    return arguments(artifact, cell, dtype) | {
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,  # used by `score` alone
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "max_model_len": -1,  # all positions, or what the pool holds
        "max_num_batched_tokens": BATCHED_TOKENS if tokens is None else tokens,
        "max_num_seqs": SEQUENCES if tokens is None else min(SEQUENCES, tokens),
        "async_scheduling": False,  # a step is over before the next begins
        "kv_cache_memory_bytes": pool_bytes(artifact, cell, dtype),
    }


def server_arguments(artifact: Path, cell: Cell, dtype: str) -> dict[str, Any]:
    """Of a server: vLLM's own settings, a cold prefix cache, room for the cell's requests."""
    options = Options(**cell.runtime.options)
    on_cpu = cell.gpu.kind == "cpu"
    eager = on_cpu if options.enforce_eager is None else options.enforce_eager
    found = arguments(artifact, cell, dtype) | {
        "enforce_eager": eager,
        "enable_prefix_caching": False,
        "use_tqdm_on_load": False,
        "max_model_len": longest(cell),
    }
    if options.max_num_batched_tokens is not None:
        found["max_num_batched_tokens"] = options.max_num_batched_tokens
    if on_cpu or options.kv_cache_gib is not None:
        found["kv_cache_memory_bytes"] = pool_bytes(artifact, cell, dtype)
    else:
        found["gpu_memory_utilization"] = options.gpu_memory_utilization
    return found


def longest(cell: Cell) -> int:
    """Tokens of the longest request that the cell names: its context, or one of its workload."""
    return max(cell.context, cell.workload.prompt_tokens + cell.workload.output_tokens)


def pool_bytes(artifact: Path, cell: Cell, dtype: str) -> int:
    """Bytes set aside for keys and values, of one device.

    As asked, else what the workload's requests at the highest concurrency take, and no less than
    half a GiB (4 GiB on a GPU).
    """
    options = Options(**cell.runtime.options)
    if options.kv_cache_gib is not None:
        return int(options.kv_cache_gib * GIB)
    sizes = models.architecture(artifact)
    wide = 1 if cell.kv_cache.name == "fp8" else 4 if dtype == "float32" else 2
    heads = max(1, sizes["kv_heads"] // parallel(cell))
    token = 2 * sizes["layers"] * heads * sizes["head_dim"] * wide
    users = max(cell.workload.concurrency, default=1)
    request = cell.workload.prompt_tokens + cell.workload.output_tokens
    need = _ROOM * token * max(cell.context, users * request)
    return max(_LEAST_POOL[cell.gpu.kind], int(need))


def too_small(artifact: Path, cell: Cell, positions: int) -> str | None:
    """Why a pool that holds one sequence of `positions` tokens is not enough for the cell."""
    wanted = cell.context
    known = models.architecture(artifact)["positions"]
    if positions >= (wanted if known is None else min(wanted, known)):
        return None
    given = Options(**cell.runtime.options).kv_cache_gib
    return (
        f"the KV pool holds {positions} tokens, fewer than `context={wanted}`; raise "
        f"`runtime.kv_cache_gib` ({'null' if given is None else f'{given:g}'} now)"
    )


def command_line(values: Mapping[str, Any]) -> list[str]:
    """Fields of `EngineArgs` as options of `vllm serve`."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words
