"""What a loaded torch model really holds: storage of its linears, bytes, classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from qgrid import gptq_kernels

if TYPE_CHECKING:
    import torch

_OWN = (
    "gptqmodel",
    "bitsandbytes",
    "compressed_tensors",
    "torchao",
    "optimum",
    "hqq",
)  # may hide tensors
_DEPTH = 4


@dataclass(frozen=True)
class Stored:
    """How one linear layer arrived: `bits` is 16 or 32 where nothing quantized it."""

    format: str
    bits: int


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linear layers by name, the output head left out."""
    head = cast(Any, model).get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if _multiplies(module) and module is not head
    }


def _multiplies(module: torch.nn.Module) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) or gptq_kernels.is_kernel(module)


def stored(module: torch.nn.Module, plain: str | None = None) -> Stored:
    """How the layer's weight is held now. Ask before the first forward pass unpacks it.

    `plain` names the dtype of an unquantized weight in the file, when loading has cast it.
    """
    import torch

    if gptq_kernels.is_kernel(module):
        return _stored_natively(module)
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    if kind == "Linear4bit":
        return Stored(f"bitsandbytes-{weight.quant_type}", 4)  # type: ignore[union-attr]
    if kind == "Linear8bitLt":
        return Stored("bitsandbytes-int8", 8)
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and scheme.weights is not None and not _is_plain(module):
        layout = getattr(scheme.format, "value", scheme.format)
        return Stored(str(layout), int(scheme.weights.num_bits))
    if weight is None:
        return Stored(kind, 0)
    dtype = plain if plain and _is_plain(module) else str(weight.dtype).removeprefix("torch.")
    return Stored(dtype + _rounding(module), 8 * getattr(torch, dtype).itemsize)


def _stored_natively(module: Any) -> Stored:
    """A layer of gptqmodel: packed as in the file, or rounded again to 8 bits for its kernel."""
    if getattr(module, "qweight", None) is None:
        return Stored("int8", 8)
    return _declared(module)


def _declared(module: Any) -> Stored:
    """What a layer of gptqmodel was given to load: other widths would not fit its tensors."""
    return Stored(gptq_kernels.format_of(module), int(module.bits))


def _rounding(module: torch.nn.Module) -> str:
    """What an unpacked layer still does to activations: compressed-tensors rounds them as it runs.

    Rounded values go into a product in floating point: the numbers of W8A8, not its speed.
    """
    inputs = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
    if inputs is None:
        return ""
    kind = "fp" if str(getattr(inputs.type, "value", inputs.type)) == "float" else "int"
    return f" with activations rounded to {kind}{inputs.num_bits}"


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether the weight is an ordinary floating-point matrix of 16 bits or more."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.is_floating_point() and weight.element_size() > 1


def histogram(model: torch.nn.Module) -> Counter[Stored]:
    """How many linears are held in which way now."""
    return Counter(stored(module) for module in linears(model).values())


def arrived(model: torch.nn.Module, plain: str | None) -> Counter[Stored]:
    """How many linears came out of the files in which way; `plain` as in `stored`.

    Ask before the first forward pass. Some kernels of gptqmodel pack anew while they load.
    """
    return Counter(
        _declared(module) if gptq_kernels.is_kernel(module) else stored(module, plain)
        for module in linears(model).values()
    )


def classes(model: torch.nn.Module) -> dict[str, int]:
    """Class names of the layers that multiply, the output head among them, with counts."""
    found = [module for module in model.modules() if _multiplies(module)]
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
    elif type(value).__module__.startswith(_OWN) and hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _inner(item, depth - 1)
