"""What a model that vLLM has loaded really computes with: read from its modules and its KV cache.

Runs wherever the model is: in this process, or in a worker of a server.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_WEIGHTS = ("weight_packed", "qweight", "weight")
_KERNELS = ("kernel", "fp8_linear", "mp_linear_kernel", "linear_kernel")
_SUFFIXES = ("LinearKernel", "Kernel")
W4A8 = " (W4A8)"  # the same kernel class, with activations rounded to 8 bits


@dataclass(frozen=True)
class Linear:
    """How one linear layer computes. A fused one (`qkv_proj`) counts as one, as vLLM runs it."""

    name: str
    method: str
    scheme: str | None
    kernel: str
    dtype: str  # of the stored weight
    quantized: bool


@dataclass(frozen=True)
class Census:
    """A loaded model: its layers, the output head, its bytes, its KV cache, its processes."""

    linears: tuple[Linear, ...]
    head: str
    weights_bytes: int
    kv_dtype: str
    kv_pool_bytes: int
    kv_blocks: int
    block_size: int
    attention: str
    device: str
    threads: int
    cores: tuple[int, ...]
    pids: tuple[int, ...]
    activation_peak_bytes: int | None = None
    reserved_bytes: int | None = None
    resident_bytes: int | None = None  # of the processes, once everything is loaded
    weight_dtypes: dict[str, int] = field(default_factory=dict)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the pool that one token takes."""
        return self.kv_pool_bytes // (self.kv_blocks * self.block_size)

    def max_concurrency(self, tokens: int) -> float:
        """Requests of so many tokens that the pool holds at once; a block is never shared."""
        return self.kv_blocks / -(-tokens // self.block_size)


def take(runner: Any) -> Census:
    """The census of a model runner."""
    import torch

    model = runner.get_model()
    linears = tuple(_linears(model))
    caches = [cache for cache in tensors(runner.kv_caches) if cache.numel()]
    config = runner.vllm_config.cache_config
    on_gpu = runner.device.type == "cuda"
    return Census(
        linears=linears,
        head=_head(model),
        weights_bytes=weights_bytes(model),
        kv_dtype=_kv_dtype(config.cache_dtype, caches),
        kv_pool_bytes=sum(_nbytes(caches)),
        kv_blocks=int(config.num_gpu_blocks),
        block_size=int(config.block_size),
        attention=_attention(runner),
        device=torch.cuda.get_device_name(runner.device) if on_gpu else "cpu",
        threads=torch.get_num_threads(),
        cores=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        pids=(os.getpid(),),
        weight_dtypes=_dtypes(model),
    )


def joined(parts: Sequence[Census]) -> Census:
    """The census of a model that is split over several workers: bytes and threads added up.

    A layer that is the same in all of them counts once, one that differs for each way it does.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    return replace(
        first,
        linears=tuple(dict.fromkeys(each for part in parts for each in part.linears)),
        weights_bytes=sum(part.weights_bytes for part in parts),
        kv_pool_bytes=sum(part.kv_pool_bytes for part in parts),
        kv_blocks=min(part.kv_blocks for part in parts),
        device=", ".join(dict.fromkeys(part.device for part in parts)),
        threads=sum(part.threads for part in parts),
        cores=tuple(sorted({core for part in parts for core in part.cores})),
        pids=tuple(pid for part in parts for pid in part.pids),
        activation_peak_bytes=_total([part.activation_peak_bytes for part in parts]),
        reserved_bytes=_total([part.reserved_bytes for part in parts]),
        resident_bytes=_total([part.resident_bytes for part in parts]),
        weight_dtypes=dict(sum((Counter(part.weight_dtypes) for part in parts), Counter())),
    )


def _total(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _linears(model: torch.nn.Module) -> Iterator[Linear]:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            method = module.quant_method
            yield Linear(
                name=name,
                method=type(method).__name__,
                scheme=_named(getattr(module, "scheme", None)),
                kernel=kernel_of(module),
                dtype=_stored(module),
                quantized=not isinstance(method, UnquantizedLinearMethod),
            )


def kernel_of(module: Any) -> str:
    """The short name of what multiplies: a kernel class without its suffix, and what it chose."""
    owners = (getattr(module, "scheme", None), module.quant_method)
    found = (getattr(owner, name, None) for owner in owners for name in _KERNELS)
    kernel = next((each for each in found if each is not None), None)
    if kernel is None:
        return _plain_kernel(module)
    name = type(kernel).__name__
    short = next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end)), name)
    if getattr(module, "use_w4a8", False):
        return short + W4A8
    path = getattr(getattr(kernel, "linear_method", None), "__name__", "")
    return f"{short} ({path.rsplit('_', maxsplit=1)[-1]})" if path else short


def _plain_kernel(module: Any) -> str:
    """What an unquantized layer multiplies with; on a CPU vLLM picks it while loading."""
    chosen = getattr(module, "cpu_linear", None)
    if chosen is None:
        return type(module.quant_method).__name__.removesuffix("LinearMethod")
    if _handler(chosen) is not None:
        return "oneDNN"
    name = getattr(chosen, "__qualname__", "")
    code = getattr(chosen, "__code__", None)
    called = code.co_names if code is not None else ()
    if "weight_packed_linear_cpu" in called:
        return "SGL"
    if "zentorch_linear_unary" in called:
        return "zentorch"
    return "torch" if "linear" in (name, *called) else name


def _handler(chosen: Any) -> Any:
    """oneDNN's handle inside the function that multiplies with it; None where it is another."""
    cells = getattr(chosen, "__closure__", None) or ()
    defaults = getattr(chosen, "__defaults__", None) or ()
    inside = [*(cell.cell_contents for cell in cells), *defaults]
    return next((each for each in inside if type(each).__name__ == "CPUDNNLGEMMHandler"), None)


def _stored(module: Any) -> str:
    """The dtype of the stored weight; vLLM drops or empties one that oneDNN has laid out anew."""
    found = (getattr(module, name, None) for name in _WEIGHTS)
    weight = next((each for each in found if each is not None), None)
    if weight is not None:
        return str(weight.dtype).removeprefix("torch.")
    kernel = getattr(getattr(module, "scheme", None), "kernel", None)
    return "int8" if getattr(kernel, "dnnl_handler", None) is not None else "unknown"


def _head(model: torch.nn.Module) -> str:
    found = [m for m in model.modules() if type(m).__name__ == "ParallelLMHead"]
    return type(found[0].quant_method).__name__ if found else "none"


def _named(value: object) -> str | None:
    return None if value is None else type(value).__name__


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of all tensors of the modules, each storage once, and of what oneDNN keeps of them."""
    hidden = sum(_kept_by_onednn(module) for module in model.modules())
    return sum(_nbytes(_held(model))) + hidden


def _kept_by_onednn(module: Any) -> int:
    """Bytes of the copy that oneDNN laid out for itself: no tensor of torch's shows it."""
    kernel = getattr(getattr(module, "scheme", None), "kernel", None)
    handler = getattr(kernel, "dnnl_handler", None)
    if handler is not None:
        return int(handler.n) * int(handler.k)
    handler = _handler(getattr(module, "cpu_linear", None))
    if handler is None:
        return 0
    return int(handler.n) * int(handler.k) * int(module.weight.element_size())


def _held(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers and tensors that layers hold as plain attributes; never the KV cache."""
    import torch

    seen: set[int] = set()
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        own += [v for n, v in vars(module).items() if n != "kv_cache" and not n.startswith("_")]
        for tensor in own:
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue
            place = tensor.untyped_storage().data_ptr()
            if place and place not in seen:
                seen.add(place)
                yield tensor


def _dtypes(model: torch.nn.Module) -> dict[str, int]:
    total: Counter[str] = Counter()
    for tensor in _held(model):
        total[str(tensor.dtype).removeprefix("torch.")] += int(tensor.untyped_storage().nbytes())
    return dict(total)


def _nbytes(held: Any) -> Iterator[int]:
    seen: set[int] = set()
    for tensor in held:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield int(storage.nbytes())


def tensors(values: Any) -> Iterator[torch.Tensor]:
    """Tensors in lists of lists."""
    import torch

    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


def _kv_dtype(configured: str, caches: Sequence[torch.Tensor]) -> str:
    """As the pool's tensors hold it; 8-bit floats lie in tensors of bytes."""
    held = ", ".join(sorted({str(cache.dtype).removeprefix("torch.") for cache in caches}))
    return configured if configured.startswith("fp8") and held == "uint8" else held


def _attention(runner: Any) -> str:
    names = {group.backend.get_name() for groups in runner.attn_groups for group in groups}
    return ", ".join(sorted(names))
