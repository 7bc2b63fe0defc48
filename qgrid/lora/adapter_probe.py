"""Whether an attached adapter does what it was trained to do beside these weights.

PEFT has a wrapper for each library's layers. What it gets wrong raises nothing: a layer that was
repacked for its kernel is read as if it were not, and the inputs of one may be scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import phrases
from qgrid.contracts import InvalidEngine
from qgrid.lora import adapter_fit
from qgrid.published._reading import Tensors
from qgrid.types import Check
from qgrid.weights import ends
from qgrid.weights.inspection import FLOATS

if TYPE_CHECKING:
    import torch

    from qgrid.lora.adapter_fit import Fit

_ROWS = 4  # inputs of the probe
# Largest error, as a share of the largest output. Seen at most: 2e-7, 1.1e-2, 1.5e-3.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-5, "float16": 2**-8}


def check_products(model: Any, method: str, folder: Path, found: Fit, dtype: str) -> Check:
    """One layer of each class in a model of wrapped layers adds the product that it should.

    What is expected is computed from the adapter's files in `folder`. The layer itself multiplies
    first: some libraries repack it then.

    Raises:
        InvalidEngine: a layer computes something else.
    """
    tensors = Tensors(folder)
    shares: dict[str, float] = {}  # class of the layer -> largest error, as a share
    for layer, module in _one_of_each(model):
        inputs = _inputs(tensors, layer, module, dtype)
        pair = _pair(tensors, found, layer)
        gain = _gain(module, pair, inputs)
        has_lengths = bool(found.config.get("use_dora"))
        magnitude = _part(tensors, layer, "lora_magnitude_vector") if has_lengths else None
        expected = _expected(module, (pair[0], gain * pair[1]), magnitude, inputs)
        with _strengthened(module, gain):
            apart, largest = _error(module, inputs, expected)
        if not apart <= _TOLERANCE[dtype] * largest:  # true for NaN too
            raise InvalidEngine(
                f"PEFT's `{type(module).__name__}` around `{type(module.base_layer).__name__}` of "
                f"method `{method}` does not add the adapter's product in {dtype}: `{layer}` is "
                f"off by {apart:.2g}, its largest output is {largest:.2g}; use "
                "`model.adapter_mode=merged`"
            )
        kind = type(module.base_layer).__name__
        shares[kind] = max(shares.get(kind, 0.0), apart / largest if largest else 0.0)
    goal = f"the adapter's product added, off by {_TOLERANCE[dtype]:.2g} of the output at most"
    told = ", ".join(f"`{kind}` {share:.2g}" for kind, share in shares.items())
    return Check("adapter_product", True, goal, f"off by {told}")


def check_inputs(folder: Path, base: Path) -> Check:
    """What scales the inputs of the layers in `folder`, such as norms, is as in `base`.

    An adapter was trained on those inputs: a method that scales them, and the layers the other way,
    leaves the model as it is and makes the adapter wrong.
    """
    stored, expected = Tensors(folder), Tensors(base)
    wrong = []
    for name, tensor in expected.headers.items():
        there = stored.headers.get(name)
        if there is None or len(tensor.shape) != 1 or not {tensor.dtype, there.dtype} <= FLOATS:
            continue
        if not ends.near(stored.array(name), expected.array(name)):
            wrong.append(name)
    goal = "the base's norms and biases, on which the adapter was trained"
    told = f"other values in {phrases.first(wrong, ', ')}" if wrong else "as in the base"
    return Check("adapter_inputs", not wrong, goal, told)


def _one_of_each(model: Any) -> Iterator[tuple[str, Any]]:
    """The first layer of each class that a wrapper of its own goes around."""
    seen = set()
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        kind = type(module), type(module.base_layer)
        if kind not in seen:
            seen.add(kind)
            yield name, module


def _inputs(tensors: Tensors, layer: str, module: Any, dtype: str) -> torch.Tensor:
    """Rows `(some, columns)` to which the adapter answers most: its own first matrix's."""
    import torch

    rows = _part(tensors, layer, "lora_A")[:_ROWS]
    rows = rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    device = next(module.lora_A.parameters()).device
    return rows.to(device, getattr(torch, dtype))


def _pair(tensors: Tensors, found: Fit, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The low-rank matrices, with the adapter's scale in the second."""
    a, b = (_part(tensors, layer, f"lora_{which}") for which in "AB")
    return a, adapter_fit.scaling(found.config, layer) * b


def _gain(module: Any, pair: tuple[torch.Tensor, torch.Tensor], inputs: torch.Tensor) -> float:
    """What makes the adapter's product as large as the layer's: a weak one would not be missed."""
    import torch

    with torch.inference_mode():
        own = module.base_layer(inputs).abs().max().item()
        added = (inputs.double().cpu() @ pair[0].T @ pair[1].T).abs().max().item()
    return max(1.0, own / added) if added > 0 else 1.0


@contextmanager
def _strengthened(module: Any, gain: float) -> Iterator[None]:
    before = dict(module.scaling)
    module.scaling.update({name: gain * scale for name, scale in before.items()})
    try:
        yield
    finally:
        module.scaling.update(before)


def _error(module: Any, inputs: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Largest difference of the wrapped layer's outputs, and the largest output."""
    import torch

    with torch.inference_mode():
        found = module(inputs).double().cpu()
    return float((found - expected).abs().max()), float(expected.abs().max())


def _expected(
    module: Any,
    pair: tuple[torch.Tensor, torch.Tensor],
    magnitude: torch.Tensor | None,
    inputs: torch.Tensor,
) -> torch.Tensor:
    """Outputs of the layer and its adapter in fp64, where the layer's own are as it computes."""
    import torch

    a, b = pair
    summed: torch.Tensor
    bias = getattr(module.base_layer, "bias", None)
    shift = torch.zeros(len(b)) if bias is None else bias.double().cpu()
    with torch.inference_mode():
        summed = module.base_layer(inputs).double().cpu() + inputs.double().cpu() @ a.T @ b.T
        if magnitude is None:
            return summed
        unit = torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
        weight = module.base_layer(unit).double().cpu()
    lengths = ((weight - shift).T + b @ a).norm(dim=1)
    turned: torch.Tensor = (summed - shift) / lengths
    return turned * magnitude + shift


def _part(tensors: Tensors, layer: str, part: str) -> torch.Tensor:
    """A tensor of the adapter in fp64; a magnitude has no `.weight` in its name."""
    import torch

    name = f"base_model.model.{layer}.{part}"
    name = name if name in tensors.headers else f"{name}.weight"
    found: torch.Tensor = torch.from_numpy(tensors.array(name)).double()
    return found
