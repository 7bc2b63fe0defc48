"""What vLLM can multiply on which device, as its locked versions were tried or as its source says.

Two views: of a plan, which knows the format and the width, and of a checkpoint's own
configuration, which knows the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qgrid import device
from qgrid.contracts import Unsupported
from qgrid.runtimes._vllm_settings import CUDA_KERNELS, W4A8, Options
from qgrid.weights import widths

if TYPE_CHECKING:
    from qgrid.types import Cell, DeviceKind

PLAIN = "safetensors-16bit"
_INTEGER = ("pack-quantized", "gptq", "awq")  # integer weights, 16-bit activations
FORMATS = (PLAIN, *_INTEGER, "int-quantized", "float-quantized")
_WIDTHS: dict[DeviceKind, dict[str, tuple[int, ...]]] = {
    "cpu": {"pack-quantized": (4,), "gptq": (4,), "awq": (4,)},
    "cuda": {"pack-quantized": (4, 8), "gptq": (4, 8), "awq": (4,)},
}
_FP8_BLOCKS = "vLLM's CPU kernel for FP8 weights in blocks needs a processor with AMX tiles"
_FP8_STATIC = "vLLM's CPU build lacks the operation that rounds activations to FP8 by a fixed scale"
_GPTQ_ZEROS = "vLLM loads `gptq` checkpoints without zero points only; set `method.symmetric=true`"
_AMX = "amx_tile"
_REFUSED = re.compile(
    r"Failed to find a kernel|not supported|not implemented|no longer supported"
    r"|Unsupported quantization|does not support|must be divisible by tensor parallel size",
    re.IGNORECASE,
)
_SMALL_POOL = re.compile(r"KV cache is needed|memory for the cache blocks|Cannot auto-fit")


def refused_dtype(cell: Cell, format_: str) -> str | None:
    """Compute dtypes that a device or a kernel lacks."""
    for key in ("dtype", "speed_dtype"):
        dtype = getattr(cell.runtime, key)
        asked = f"`runtime.{key}={dtype}`"
        if cell.gpu.kind == "cpu" and dtype == "float16":
            return (
                f"vLLM multiplies {asked} on a CPU by another library than it does bfloat16, "
                "without a word; use bfloat16"
            )
        if dtype == "float32" and format_ in _INTEGER:
            return (
                f"vLLM's kernels for `{format_}` multiply 16-bit activations only, not {asked}; "
                "use bfloat16"
            )
        if dtype == "float32" and cell.gpu.kind == "cuda" and format_ != PLAIN:
            return f"vLLM's CUDA kernels for `{format_}` give no {asked}; use bfloat16"
    return None


def refused_format(cell: Cell, format_: str) -> str | None:
    """Widths that no kernel of the device has, of single layers too."""
    kind = cell.gpu.kind
    has = _WIDTHS[kind].get(format_)
    lacking = [] if has is None else sorted(widths.asked(cell) - set(has))
    if has is not None and lacking:
        return (
            f"vLLM has no {kind} kernel for {lacking[0]}-bit weights in `{format_}` with 16-bit "
            f"activations (has: {' and '.join(map(str, has))} bits)"
        )
    return None


def refused_scheme(cell: Cell, format_: str) -> str | None:
    """What the options of a method say about how it will store; a checkpoint is asked again."""
    options = cell.method.options
    if format_ == "gptq" and options.get("symmetric") is False:
        return _GPTQ_ZEROS
    if format_ != "float-quantized" or cell.gpu.kind != "cpu":
        return None
    if options.get("scheme") == "block" and not _has_amx():
        return _FP8_BLOCKS
    return _FP8_STATIC if options.get("scheme") == "static" else None


def refused_kernel(cell: Cell, format_: str) -> str | None:
    """Kernels that this device or these weights do not have."""
    asked, kind = Options(**cell.runtime.options).kernel, cell.gpu.kind
    if asked == "auto":
        return None
    known = CUDA_KERNELS if kind == "cuda" else (W4A8,)
    if asked not in known:
        has = ", ".join(("auto", *known))
        return f"vLLM has no `runtime.kernel={asked}` on {kind} (has: {has})"
    if cell.bits >= 16:
        return f"`runtime.kernel={asked}` is for quantized layers; 16-bit ones have `auto` alone"
    return _refused_w4a8(format_) if kind == "cpu" else None


def _refused_w4a8(format_: str) -> str | None:
    if format_ not in _INTEGER:
        return f"`runtime.kernel=w4a8` multiplies 4-bit weights, not `{format_}`; use auto"
    if not _has_amx():
        return (
            "`runtime.kernel=w4a8` needs a processor with AMX tiles; on this one vLLM would "
            "multiply 16-bit activations all the same"
        )
    return None


def objection(config: Mapping[str, Any], kind: DeviceKind) -> str | None:
    """Why a checkpoint with this `quantization_config` cannot be run on the device."""
    if config.get("quant_method") == "gptq":
        return _refused_gptq(config)
    if kind != "cpu":
        return None
    for group in config.get("config_groups", {}).values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        found = _refused_group(weights, inputs)
        if found is not None:
            return found
    return None


def _refused_gptq(config: Mapping[str, Any]) -> str | None:
    """What of native GPTQ checkpoints vLLM does not load on any device."""
    if not config.get("sym", True):
        return _GPTQ_ZEROS
    if config.get("desc_act"):
        return (
            "vLLM no longer loads `gptq` checkpoints whose groups follow the activations' order "
            "(`desc_act`); quantize with a static order"
        )
    return None


def _refused_group(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> str | None:
    """What a group of compressed-tensors asks for that vLLM's CPU kernels do not do."""
    if weights.get("type") != "float":
        return None
    strategy, bits = weights.get("strategy"), weights.get("num_bits")
    reasons = (
        (bits != 8, f"vLLM has no CPU kernel for {bits}-bit floating-point weights"),
        (inputs is None, "vLLM has no CPU kernel for FP8 weights with 16-bit activations"),
        (
            strategy == "block" and not _has_amx(),
            _FP8_BLOCKS,
        ),
        (
            inputs is not None and not inputs.get("dynamic"),
            _FP8_STATIC,
        ),
        (
            strategy == "tensor",
            "vLLM's CPU build lacks the operation that joins layers with one FP8 scale each",
        ),
    )
    return next((reason for applies, reason in reasons if applies), None)


def _has_amx() -> bool:
    return _AMX in device.cpu_fields().get("flags", "").split()


def refused(message: str) -> str | None:
    """What an error of vLLM's means, in one line: nothing for such weights, or too little room."""
    told = " ".join(message.split()).partition(" [type=")[0]  # pydantic shows all arguments there
    if _SMALL_POOL.search(told):
        return (
            "the KV pool is too small for one request; raise `runtime.kv_cache_gib` (on a GPU's "
            f"server `runtime.gpu_memory_utilization`), or ask for shorter ones: {told}"
        )
    if _REFUSED.search(told):
        return f"vLLM cannot run this checkpoint here: {told}"
    return None


@contextmanager
def explained() -> Iterator[None]:
    """Turn vLLM's own refusals while loading into `Unsupported`, in one line."""
    try:
        yield
    except Unsupported:  # explained already
        raise
    except (ValueError, NotImplementedError) as error:
        told = refused(str(error))
        if told is None:
            raise
        raise Unsupported(told) from error
