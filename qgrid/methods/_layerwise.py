"""Methods that quantize one linear layer after the other, and checkpoints with their own loader.

Such a checkpoint is safetensors with a few tensors a layer under the layer's name, and a
`quantization_config` in `config.json` that names the layers. What is not quantized lies beside them
in 16 bits. `load` makes the model without weights, puts the layers in and fills the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.contracts import Built, InvalidEngine, Unsupported
from qgrid.methods import _checkpoint
from qgrid.weights import inspection, widths

if TYPE_CHECKING:
    import torch

    from qgrid.types import Cell

MAX_FILE_BYTES = 5 * 10**9  # of a checkpoint in several files, as on the hub

Parts = Mapping[str, Any]  # a layer's tensors by their names within it
Quantize = Callable[[Any, int], Parts]  # (linear layer, bits) -> what is stored of it
Rebuild = Callable[[Any, Parts, Any], Any]  # (linear layer, parts, dtype) -> layer that computes


def linears(cell: Cell, source: Path, model: Any) -> dict[str, tuple[Any, int]]:
    """The linear layers to quantize and their widths, by name.

    Raises:
        Unsupported: the model holds a linear layer of the checkpoint in another kind of module.
    """
    import torch

    found, wrong = {}, []
    modules = dict(model.named_modules())
    for name, bits in widths.by_layer(cell, source).items():
        if bits == widths.UNQUANTIZED:
            continue
        if isinstance(modules.get(name), torch.nn.Linear):
            found[name] = modules[name], bits
        else:
            wrong.append(name)
    if wrong:
        raise Unsupported(
            f"`method={cell.method.name}` quantizes linear layers of torch, but transformers holds "
            f"{len(wrong)} layers of this model otherwise: {', '.join(wrong[:3])}"
            f"{', ...' if len(wrong) > 3 else ''}; use another method"
        )
    return found


@dataclass(frozen=True)
class Checkpoint:
    """One to write: from `source` into `out`, with its `quantization_config`.

    `metadata` goes into the header of every file.
    """

    source: Path
    out: Path
    description: Mapping[str, Any]
    metadata: dict[str, str] | None = None


def quantize(cell: Cell, into: Checkpoint, apart: Quantize, rebuild: Rebuild) -> Built:
    """Quantize the layers of the source, write them, and compute with what was written.

    The layers' widths are added to the description.

    Raises:
        Unsupported: the source is quantized already, or its layers are none of torch's.
    """
    import torch

    source = into.source
    _checkpoint.refuse_quantized(source)
    model = _checkpoint.load_16bit(source, cell.model)
    layers = linears(cell, source, model)
    with torch.no_grad():
        parts = {name: _apart(apart, *each) for name, each in layers.items()}
    named = {name: bits for name, (_, bits) in layers.items()}
    write(model, parts, replace(into, description={**into.description, "layers": named}))
    for name, (linear, _) in layers.items():
        model.set_submodule(name, rebuild(linear, parts[name], model.dtype))
    ids = _checkpoint.probe(source, cell)
    return Built(probe=ids, reference=_checkpoint.logits(model, ids))


def _apart(apart: Quantize, linear: Any, bits: int) -> dict[str, Any]:
    """What is stored of a layer; its weights go."""
    import torch

    size, dtype = tuple(linear.weight.shape), linear.weight.dtype
    parts = {key: tensor.contiguous() for key, tensor in apart(linear, bits).items()}
    parts["shape"] = torch.tensor(size)
    if linear.bias is not None:
        parts["bias"] = linear.bias.detach().to(dtype)
    linear.weight = torch.nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)
    return parts


def write(model: Any, parts: Mapping[str, Parts], into: Checkpoint) -> None:
    """Write `parts`, tensors of the quantized layers, the rest of the model, and the config."""
    tensors = {f"{name}.{key}": part for name, each in parts.items() for key, part in each.items()}
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in parts and name not in tied:
            tensors[name] = tensor
    _save(tensors, into)
    _checkpoint.copy_configs(into.source, into.out)
    model.config.save_pretrained(into.out)
    path = into.out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = dict(into.description)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    _checkpoint.copy_tokenizer(into.source, into.out)


def _save(tensors: Mapping[str, Any], into: Checkpoint) -> None:
    """Files of a size that the hub takes, and the index where there are several.

    `huggingface_hub.save_torch_state_dict` keeps the metadata of several files in the index only,
    where no loader looks for it.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=MAX_FILE_BYTES)
    for file, names in split.filename_to_tensors.items():
        part = {name: tensors[name].contiguous() for name in names}
        save_file(part, into.out / file, {"format": "pt", **(into.metadata or {})})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (into.out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def load(folder: Path, arguments: Mapping[str, Any], rebuild: Rebuild) -> Any:
    """The model in `folder`; `arguments` are those of `from_pretrained`.

    Raises:
        InvalidEngine: a tensor of the model is in no file.
    """
    import torch

    model, dtype = _skeleton(folder, arguments)
    device = torch.device((arguments.get("device_map") or {"": "cpu"})[""])
    rest = _tensors(folder, device)
    for name in inspection.quantization_config(folder)["layers"]:
        own = [key for key in rest if key.startswith(f"{name}.")]
        # Copied to aligned memory: in a file a tensor begins anywhere, and torch's product of bf16
        # and int8 (2.13, on a CPU) ends the process on a weight that does.
        parts = {key.removeprefix(f"{name}."): rest.pop(key).clone() for key in own}
        model.set_submodule(name, rebuild(model.get_submodule(name), parts, dtype))
    floats = {
        key: part.to(dtype) if part.is_floating_point() else part for key, part in rest.items()
    }
    model.load_state_dict(floats, strict=False, assign=True)
    model.tie_weights()
    absent = [name for name, each in model.named_parameters() if each.device.type == "meta"]
    if absent:
        lacking = ", ".join(absent[:3])
        raise InvalidEngine(f"`{folder}` holds no {lacking}; build the artifact again")
    return model.to(device).eval()


def _skeleton(folder: Path, arguments: Mapping[str, Any]) -> tuple[Any, torch.dtype]:
    """The model without weights, its tables of positions computed, and the dtype it computes in."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"trust_remote_code": arguments.get("trust_remote_code", False)}
    config = AutoConfig.from_pretrained(folder, **trust)
    asked = arguments.get("dtype", "auto")
    dtype = config.dtype if asked == "auto" else asked
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    chosen = {key: arguments[key] for key in ("attn_implementation",) if key in arguments}
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **trust, **chosen), dtype


def _tensors(folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in inspection.weight_files(folder):
        found |= load_file(path, device=str(device))
    return found
