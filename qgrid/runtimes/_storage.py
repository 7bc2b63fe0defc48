"""What a loaded torch model really holds: storage of its linears, bytes, classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from qgrid.runtimes import _linears
from qgrid.runtimes._linears import Stored

if TYPE_CHECKING:
    import torch

_DEPTH = 4


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linear layers by name, the output head left out."""
    head = cast(Any, model).get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if _linears.multiplies(module) and module is not head
    }


def histogram(model: torch.nn.Module) -> Counter[Stored]:
    """How many linears are held in which way now."""
    return Counter(_linears.stored(module) for module in linears(model).values())


def arrived(model: torch.nn.Module, plain: str | None) -> Counter[Stored]:
    """How many linears came out of the files in which way; `plain` names the dtype of
    unquantized weights in the file, when loading has cast them.

    Ask before the first forward pass. Some kernels of gptqmodel pack anew while they load.
    """
    return Counter(_linears.arrived(module, plain) for module in linears(model).values())


def classes(model: torch.nn.Module) -> dict[str, int]:
    """Class names of the layers that multiply, the output head among them, with counts."""
    found = [module for module in model.modules() if _linears.multiplies(module)]
    return dict(Counter(type(module).__name__ for module in found))


def dtypes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes by dtype of every tensor that the model holds."""
    total: Counter[str] = Counter()
    for tensor in tensors(model):
        total[str(tensor.dtype).removeprefix("torch.")] += _nbytes(tensor)
    return dict(total)


def tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Every distinct tensor of the model, those inside quantized ones and their states included."""
    seen: set[int] = set()
    for module in model.modules():
        for value in _attributes(module):
            for tensor in _inner(value, _DEPTH):
                place = tensor.untyped_storage().data_ptr()
                if place and place not in seen:
                    seen.add(place)
                    yield tensor


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of all those tensors, each storage once."""
    return sum(_nbytes(tensor) for tensor in tensors(model))


def _nbytes(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())


def _attributes(module: torch.nn.Module) -> Iterator[Any]:
    yield from module._parameters.values()
    yield from module._buffers.values()
    for name, value in vars(module).items():
        if name not in {"_parameters", "_buffers", "_modules"}:
            yield value


def _inner(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """Tensors in `value`: itself, the parts of a tensor subclass, what libraries attach to it."""
    import torch

    if depth == 0:
        return
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _inner(getattr(value, name), depth - 1)
        elif value.device.type != "meta":
            yield value
        for attached in vars(value).values():
            yield from _inner(attached, depth - 1)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _inner(item, depth - 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _inner(item, depth - 1)
    elif type(value).__module__.startswith(_linears.packages()) and hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _inner(item, depth - 1)
