"""The linear layers of a GGUF file under the names that the base checkpoint gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from qgrid.contracts import Unsupported
from qgrid.gguf.types import PLAIN
from qgrid.types import ModuleState, Tensor

_LINEAR = re.compile(r"^blk\.\d+\.(?!.*norm).*\.weight$")


def places(folder: Path, tensors: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """Linear layer of the decoder -> its tensor.

    The names are those of the checkpoint where `config.json` tells an architecture that the
    converter knows, else GGUF's own in `tensors`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        return tensors_of(config)
    except Unsupported:
        if tensors is None:
            raise
        found = [name for name, tensor in tensors.items() if len(tensor.shape) == 2]
        return {name.removesuffix(".weight"): name for name in found if _LINEAR.match(name)}


def tensors_of(config: Mapping[str, object]) -> dict[str, str]:
    """Linear layer of the decoder -> its tensor, for a checkpoint with this `config.json`.

    Raises:
        Unsupported: an architecture that the converter does not know.
    """
    from qgrid.gguf import convert  # reads checkpoints by way of this module

    known = convert.tensor_names(config)
    return {module: f"{name}.weight" for module, name in known.items() if name.startswith("blk.")}


def shapes(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linear layers as the file has them; (0, 0) for one that it lacks."""
    found = {}
    for module, name in names.items():
        shape = tensors[name].shape if name in tensors else (0, 0)
        found[module] = (shape[0], shape[-1])
    return found


def states(
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, tuple[int, int]],
    method: str,
) -> dict[str, ModuleState]:
    """How each of the `linears` is stored; `method` labels the quantized ones."""
    return {
        module: _state(tensors.get(names.get(module, "")), rows * columns, method)
        for module, (rows, columns) in linears.items()
    }


def _state(tensor: Tensor | None, num_weights: int, method: str) -> ModuleState:
    if tensor is None:
        return ModuleState("none", "missing", 0.0, num_weights)
    label = "none" if tensor.dtype in PLAIN else method
    return ModuleState(label, tensor.dtype, 8 * tensor.nbytes / num_weights, num_weights)
