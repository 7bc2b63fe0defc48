"""gptqmodel: the kernels that multiply native `gptq` and `awq` checkpoints, and its quiet import.

A kernel is asked for by its short name: gptqmodel's backend without the format before it. Which of
them exist is known here without importing anything; the library has the last word when it loads.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgrid import device as devices
from qgrid.contracts import Unsupported
from qgrid.types import Gpu
from qgrid.weights import inspection

AUTO = "auto"  # the library's own choice, among those that compute in the dtype asked for
PLAIN = "torch"  # unpacks all weights in every pass; the only one with fp32 arithmetic
_ATEN = {"torch_aten": (32, 64, 128, 256), "torch_fused": (32, 64, 128, 256)}  # their groups
_WORKERS = "2"  # its default pool has one worker on two cores, and fails


@dataclass(frozen=True)
class Kernel:
    """What one kernel multiplies, and where."""

    bits: tuple[int, ...]
    devices: tuple[str, ...]
    capability: str | None = None  # the least that a GPU must have


_BOTH = ("cpu", "cuda")
# From the kernels' own declarations in gptqmodel 7.6.0 (`SUPPORTS_BITS`, `SUPPORTS_DEVICES`,
# `validate_device`). Machete is for Hopper alone, which the library says of a later GPU itself.
KERNELS: dict[str, dict[str, Kernel]] = {
    "gptq": {
        "torch": Kernel((2, 3, 4, 8), _BOTH),
        "torch_aten": Kernel((4,), ("cpu",)),
        "torch_fused": Kernel((4,), ("cpu",)),
        "torch_int8": Kernel((2, 4, 8), ("cpu",)),
        "triton": Kernel((2, 4, 8), ("cuda",)),
        "exllama_v2": Kernel((4,), ("cuda",)),
        "marlin": Kernel((4, 8), ("cuda",), "sm_75"),
        "machete": Kernel((4, 8), ("cuda",), "sm_90"),
    },
    "awq": {
        "torch": Kernel((4,), _BOTH),
        "torch_aten": Kernel((4,), ("cpu",)),
        "torch_fused": Kernel((4,), ("cpu",)),
        "torch_int8": Kernel((4,), ("cpu",)),
        "gemm": Kernel((4,), ("cuda",)),
        "gemm_triton": Kernel((4,), ("cuda",)),
        "exllama_v2": Kernel((4,), ("cuda",)),
        "marlin": Kernel((4,), ("cuda",), "sm_80"),
        "machete": Kernel((4,), ("cuda",), "sm_90"),
    },
}


def available(layout: str, bits: int, device: str) -> tuple[str, ...]:
    """Kernels that multiply weights of this format and width on this kind of device."""
    known = KERNELS.get(layout, {})
    return tuple(
        name for name, each in known.items() if bits in each.bits and device in each.devices
    )


def refusal(kernel: str, layout: str, bits: int, gpu: Gpu) -> str | None:
    """Why `kernel` cannot be had for an artifact; None if it can, as far as is known here."""
    if kernel == AUTO:
        return None
    if layout not in KERNELS:
        formats = " and ".join(f"`{name}`" for name in KERNELS)
        return (
            f"`runtime.kernel={kernel}` chooses among kernels for the formats {formats}, but the "
            f"artifact is `{layout}`; set `runtime.kernel={AUTO}`"
        )
    has = (AUTO, *available(layout, bits, gpu.kind))
    if kernel in has:
        lacks = devices.lack(gpu, KERNELS[layout][kernel].capability)
        return None if lacks is None else f"`runtime.kernel={kernel}` {lacks}"
    return (
        f"there is no `runtime.kernel={kernel}` for the format `{layout}` with {bits} bits on "
        f"{gpu.kind} (has: {', '.join(has)})"
    )


def layout(folder: Path) -> str | None:
    """The native format of a checkpoint that gptqmodel's kernels multiply, if it is one."""
    method = inspection.quantization_config(folder).get("quant_method")
    return method if method in KERNELS else None


def lacks(kernel: str, layout: str, group_size: int, symmetric: bool) -> str | None:
    """What a kernel cannot multiply although it loads it; `group_size` -1: one scale a row."""
    if kernel in _ATEN and group_size not in _ATEN[kernel]:
        has = ", ".join(map(str, _ATEN[kernel]))
        return f"weights in groups of {'a row' if group_size < 0 else group_size} (has: {has})"
    if (kernel, layout) == ("torch_fused", "gptq") and not symmetric:
        return "zero points of `gptq`: it takes all for zero"
    return None


def asked(folder: Path, kernel: str, dtype: str, device: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that ask for a kernel; none where gptqmodel is not needed.

    `auto` in fp32 means the one kernel that computes in it: the library would choose another that
    rounds activations and scales to bf16. So it does on a CPU where the library's choice, an int4
    product of torch, fails in the first pass.

    Raises:
        Unsupported: the kernel would fail or compute something else.
    """
    native = layout(folder)
    if native is None:
        return {}
    library()
    from transformers import AwqConfig, GPTQConfig

    stored = inspection.quantization_config(folder)
    bits, packing = stored["bits"], (native, stored["group_size"], stored.get("sym", True))
    if reason := lacks(kernel, *packing):
        raise Unsupported(f"`runtime.kernel={kernel}` does not multiply {reason}")
    fails = device == "cpu" and bits == 4 and lacks("torch_aten", *packing) is not None
    wanted = PLAIN if kernel == AUTO and (dtype == "float32" or fails) else kernel
    config = GPTQConfig(bits=bits) if native == "gptq" else AwqConfig(bits=bits)
    # Set afterwards: transformers knows fewer names than gptqmodel. Only this attribute of the
    # argument counts; the rest comes from the checkpoint.
    config.backend = AUTO if wanted == AUTO else f"{native}_{wanted}"
    return {"quantization_config": config}


def is_kernel(module: Any) -> bool:
    """Whether a module is one of gptqmodel's linear layers."""
    return type(module).__module__.startswith("gptqmodel.") and hasattr(module, "SUPPORTS_BACKENDS")


def name(module: Any) -> str:
    """The short name of the kernel that a layer really has."""
    return str(module.backend.value).removeprefix(f"{format_of(module)}_")


def format_of(module: Any) -> str:
    """The checkpoint format that a layer's kernel reads."""
    return str(type(module).SUPPORTS_METHODS[0].value)


def computes_in(module: Any, dtype: str) -> str:
    """The dtype of the products of a layer that is given activations of `dtype`."""
    kernel = name(module)
    if kernel in {"torch_aten", "torch_fused"}:
        return "bfloat16"  # aten's int4 product on a CPU has no other
    if format_of(module) == "awq" and dtype == "float32" and kernel == PLAIN:
        return "float16"
    return dtype


def computes_exactly(module: Any, dtype: str) -> bool:
    """Whether a layer unpacks to fp32 when its scales are fp32: code times scale, not rounded."""
    native = name(module) == PLAIN and format_of(module) == "gptq"
    return native and dtype == "float32"


def slow(module: Any, symmetric: bool, dtype: str, device: str) -> str | None:
    """One sentence where a layer's kernel unpacks it in every pass and another would not.

    `symmetric` is the checkpoint's: optimum hands it to the layer in the place of `desc_act`.
    """
    if name(module) != PLAIN or dtype == "float32":
        return None
    layout, bits = format_of(module), int(module.bits)
    packing = layout, int(module.requested_group_size), symmetric
    has = available(layout, bits, device)
    others = [each for each in has if each != PLAIN and lacks(each, *packing) is None]
    if not others:
        return None
    return (
        f"`{PLAIN}` unpacks all weights in every pass; for {bits} bits on {device} there are also "
        f"{', '.join(others)} (`runtime.kernel`)"
    )


def library() -> Any:
    """gptqmodel, imported without its banner and notes."""
    settings: Mapping[str, str] = {"GPTQMODEL_CPU_WORKERS": _WORKERS}
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    importlib.import_module("logbar").LogBar.shared().setLevel("WARNING")
    import gptqmodel

    return gptqmodel
