"""What a checkpoint folder really stores, from the headers of its files; no torch needed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from qgrid import layouts, models
from qgrid.gguf import layers
from qgrid.layouts import FLOATS, FLOATS_16
from qgrid.lora import adapters
from qgrid.types import ModuleState, Tensor
from qgrid.weights.headers import (
    TornFile,
    every_weight_file,
    is_gguf,
    read_header,
    read_headers,
    weight_files,
)

__all__ = [
    "FLOATS",
    "FLOATS_16",
    "Contents",
    "TornFile",
    "decoder_linears",
    "every_weight_file",
    "inspect",
    "is_decoder_linear",
    "is_gguf",
    "is_router",
    "num_parameters",
    "quantization_config",
    "read_header",
    "read_headers",
    "stored_linears",
    "weight_files",
]

_DECODER_LINEAR = re.compile(r"\.(?:layers|h|blocks|block)\.\d+\.(?!.*norm).*$")
ROUTER = r".*\.(?:(?<!attn\.)gate|router|shared_expert_gate)$"  # of the names of its modules
_ROPE_TABLE = re.compile(
    r"(?:\.inv_freq|^rope_(?:freqs|factors_\w+)\.weight)$"
)  # computed, not learned


@dataclass(frozen=True)
class Contents:
    """The tensors of a folder and what they add up to; bits count scales and zero points.

    What an adapter beside them takes is in `dtypes`, `tensor_types` and `bits_per_weight`, as its
    merged sum would be; it is no further parameter.
    """

    format: str
    tensors: Mapping[str, Tensor]
    dtypes: Mapping[str, int]  # stored dtype -> bytes
    modules: Mapping[str, ModuleState]  # linear layers of the decoder
    shapes: Mapping[str, tuple[int, int]]  # of those layers: rows, columns
    num_parameters: int
    bits_per_weight: float
    linear_bits_per_weight: float
    tensor_types: Mapping[str, int] = field(default_factory=dict)  # stored dtype -> tensors


def inspect(folder: Path, base: Path | None = None, method: str = "quantized") -> Contents:
    """Account for every stored tensor of `folder`.

    `base` is the 16-bit checkpoint that tells which layers are linear and how large; without it
    the shapes that the folder itself keeps are used. `method` labels the quantized modules. The
    modules of a GGUF file have the checkpoint's names; their format is the tensor's type.

    Raises:
        TornFile: a file's length contradicts its header.
    """
    tensors = read_headers(folder)
    original = read_headers(base) if base else {}
    if is_gguf(folder):
        names = layers.places(folder, tensors)
        linears = decoder_linears(original) or layers.shapes(names, tensors)
        modules = layers.states(names, tensors, linears, method)
        count = num_parameters(folder, original) or num_parameters(folder, tensors)
    else:
        linears = decoder_linears(original) or stored_linears(folder, tensors)
        modules = _modules(tensors, linears, method)
        count = num_parameters(folder, original) or num_parameters(folder, tensors, linears)
    dtypes: dict[str, int] = defaultdict(int)
    every = [*tensors.values(), *adapters.tensors(folder / adapters.FOLDER)]
    for tensor in every:
        dtypes[tensor.dtype] += tensor.nbytes
    weights = sum(state.num_weights for state in modules.values())
    bits = sum(state.bits * state.num_weights for state in modules.values())
    return Contents(
        format=_format(folder, tensors, (state.format for state in modules.values())),
        tensors=tensors,
        dtypes=dict(dtypes),
        modules=modules,
        shapes=linears,
        num_parameters=count,
        bits_per_weight=8 * sum(dtypes.values()) / count if count else 0.0,
        linear_bits_per_weight=bits / weights if weights else 0.0,
        tensor_types=dict(Counter(tensor.dtype for tensor in every)),
    )


def decoder_linears(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Linear layers of a 16-bit checkpoint's decoder: name -> (rows, columns).

    Embeddings, the output head, norms and the routers of mixtures of experts are not among them:
    they stay at 16 bits by design.
    """
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in FLOATS
        if is_decoder_linear(name.removesuffix(".weight"))
    }


def is_decoder_linear(module: str) -> bool:
    """Whether a module with a two-dimensional weight belongs to the quantized part of a decoder."""
    return bool(_DECODER_LINEAR.search("." + module)) and not is_router(module)


def is_router(module: str) -> bool:
    """Whether a module chooses the experts of a mixture, which every method leaves as it is."""
    return re.match(ROUTER, module) is not None


def stored_linears(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Linear layers from the shapes that a quantized folder keeps itself."""
    found = decoder_linears(tensors)
    places: dict[str, tuple[Path, int]] = {}  # where a tensor begins; headers are read when needed

    def read(name: str) -> bytes:
        if not places:
            for path in weight_files(folder):
                places.update({n: (path, start) for n, (_, start) in read_header(path).items()})
        path, start = places[name]
        with path.open("rb") as file:
            file.seek(start)
            return file.read(tensors[name].nbytes)

    for module, parts in _by_layer(tensors).items():
        shape = layouts.shape(parts, lambda part, module=module: read(f"{module}.{part}"))  # type: ignore[misc]
        if shape is not None:
            found[module] = shape
    return found


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the layer that they seem to belong to, where its weight is in several."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, dot, _ = name.partition(".weight")
        module = module if dot else name.rpartition(".")[0]
        found[module][name.removeprefix(f"{module}.")] = tensor
    return found


def num_parameters(
    folder: Path,
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, tuple[int, int]] | None = None,
) -> int:
    """Parameters of a checkpoint; a head tied to the embedding is counted once.

    `linears` gives the sizes of layers whose stored tensors do not show them.
    """
    config = models.read_config(folder)
    skip = {"lm_head.weight", "output.weight"} if models.tied(config) else set()
    known = linears or {}
    total = sum(rows * columns for rows, columns in known.values())
    for name, tensor in tensors.items():
        owner = _owner(name, known)
        counted = name not in skip and not _ROPE_TABLE.search(name)
        if counted and (owner is None or name == f"{owner}.bias"):
            total += prod(tensor.shape)
    return total


def quantization_config(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint; empty for one that is not quantized."""
    config = models.read_config(folder)
    found = config.get("quantization_config") or {}
    return found if isinstance(found, dict) else {"quant_method": found}


def already_quantized(folder: Path, name: str) -> str | None:
    """Why a checkpoint, `name` in `model.id`, is no base; None for one of 16 or 32 bits."""
    config = quantization_config(folder)
    if not config:
        return None
    return (
        f"`model.id={name}` is already quantized ({config.get('quant_method')}); "
        "give the 16-bit checkpoint that it was made from"
    )


def _format(folder: Path, tensors: Mapping[str, Tensor], kinds: Iterable[str]) -> str:
    """What the layers are stored as, or the floats of a folder in which none is quantized."""
    if is_gguf(folder):
        return "gguf"
    quantized = sorted(set(kinds) - layouts.PLAIN)
    if quantized:
        return "+".join(quantized)
    floats = {t.dtype for t in tensors.values() if t.dtype in FLOATS}
    return "safetensors-16bit" if floats <= FLOATS_16 else "safetensors-32bit"


def _modules(
    tensors: Mapping[str, Tensor], linears: Mapping[str, tuple[int, int]], method: str
) -> dict[str, ModuleState]:
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in linears}
    for name, tensor in tensors.items():
        owner = _owner(name, parts)
        if owner is not None and name != f"{owner}.bias":
            parts[owner][name.removeprefix(owner + ".")] = tensor
    return {
        name: _state(parts[name], rows * columns, method)
        for name, (rows, columns) in linears.items()
    }


def _owner(tensor: str, linears: Mapping[str, Any]) -> str | None:
    module = tensor
    while "." in module:
        module = module.rpartition(".")[0]
        if module in linears:
            return module
    return None


def _state(parts: Mapping[str, Tensor], num_weights: int, method: str) -> ModuleState:
    bits = 8 * sum(tensor.nbytes for tensor in parts.values()) / num_weights
    kind = layouts.format_of(parts)
    return ModuleState("none" if kind in layouts.PLAIN else method, kind, bits, num_weights)
