"""Checkpoints decoded by hand, without the libraries that write and read them.

Codes narrower than a byte lie in bytes (three bits of hqq: ten in a word of 32). By whole blocks of
rows, the first in the highest bits of every byte for hqq, in the lowest for quanto; along a row for
compressed-tensors, as one stream from the lowest bit of its words, and for bitsandbytes, the first
in the highest bits of a byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Parts = dict[str, torch.Tensor]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The dequantized weights `(rows, columns)` of every quantized layer, fp64."""
    stored: Parts = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    decode = _DECODERS[told["quant_method"]]
    marks = (".W_q", ".weight._scale", "._weight_scale", ".weight_scale", ".SCB", ".weight.absmax")
    names = [name.removesuffix(mark) for name in stored for mark in marks if name.endswith(mark)]
    assert names
    found = {}
    for name in names:
        parts = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(name)}
        found[name] = decode(parts, told)
    return found


def _hqq(parts: Parts, told: dict[str, Any]) -> torch.Tensor:
    rows, columns = parts["shape"].tolist()
    codes, scale, zero = parts["W_q"].long(), parts["scale"].double(), parts["zero"].double()
    length = rows * columns // scale.numel()
    height = scale.numel() if told["axis"] == 1 else length
    if parts["W_q"].dtype == torch.int32:
        places, mask = range(27, -1, -3), 7
    else:
        bits = 8 * codes.numel() // (rows * columns)
        places, mask = range(8 - bits, -1, -bits), 2**bits - 1
    unpacked = torch.cat([(codes >> place) & mask for place in places])[:height]
    return ((unpacked - zero) * scale).reshape(rows, columns)


def _quanto(parts: Parts, told: dict[str, Any]) -> torch.Tensor:
    scale = parts["weight._scale"].double()
    if "weight._data" in parts:
        return parts["weight._data"].double() * scale
    rows, columns = parts["shape"].tolist()
    codes = parts["weight._data._data"].long()
    bits = 8 * codes.numel() // (rows * columns)
    unpacked = torch.cat([(codes >> place) & (2**bits - 1) for place in range(0, 8, bits)])
    shift = parts["weight._shift"].double()
    return (unpacked[: len(scale)] * scale - shift).reshape(rows, columns)


def _torchao(parts: Parts, told: dict[str, Any]) -> torch.Tensor:
    if "_weight_zero_point" in parts:
        assert not parts["_weight_zero_point"].any()
    return parts["_weight_qdata"].double() * parts["_weight_scale"].double()


def _compressed(parts: Parts, told: dict[str, Any]) -> torch.Tensor:
    scale = parts["weight_scale"].double()
    if scale.ndim < 2:
        scale = scale.reshape(1, 1)
    if "weight_packed" not in parts:
        weight = parts["weight"].double()
        down, across = (
            -(-size // count) for size, count in zip(weight.shape, scale.shape, strict=True)
        )
        return weight * scale.repeat_interleave(down, 0).repeat_interleave(across, 1)
    rows, columns = parts["weight_shape"].tolist()
    (group,) = told["config_groups"].values()
    bits: int = group["weights"]["num_bits"]
    codes = _stream(parts["weight_packed"], bits)[:, :columns]
    zero = torch.zeros(1, 1, dtype=torch.long)
    if "weight_zero_point" in parts:
        zero = _stream(parts["weight_zero_point"].T, bits)[:, :rows].T - 2 ** (bits - 1)
    length = columns // scale.shape[1]
    centred = codes - 2 ** (bits - 1)
    spread = zero.expand(rows, scale.shape[1]).repeat_interleave(length, 1)
    found: torch.Tensor = (centred - spread) * scale.repeat_interleave(length, 1)
    return found


def _stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes along each row of words, one after the other, whether or not they end in a word."""
    stream = (words.long()[:, :, None] >> torch.arange(32)) & 1
    found: torch.Tensor = (stream.reshape(len(words), -1, bits) << torch.arange(bits)).sum(-1)
    return found


def _bitsandbytes(parts: Parts, told: dict[str, Any]) -> torch.Tensor:
    if "SCB" in parts:
        return parts["weight"].double() * parts["SCB"].double()[:, None] / 127
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    codes = parts["weight"].long().flatten()
    values = _NORMAL[torch.stack([codes >> 4, codes & 15], -1).flatten()]
    sizes = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        nested = parts["weight.nested_quant_map"].double()[sizes.long()]
        largest = (
            parts["weight.nested_absmax"].double().repeat_interleave(state["nested_blocksize"])
        )
        sizes = nested * largest[: len(nested)] + state["nested_offset"]
    scaled = values.reshape(-1, state["blocksize"]) * sizes.double()[:, None]
    return scaled.reshape(state["shape"])


# QLoRA (Dettmers et al. 2023, arXiv 2305.14314), appendix E.
_NORMAL = torch.tensor(
    [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1], dtype=torch.float64,
)  # fmt: skip
_DECODERS = {
    "hqq": _hqq,
    "quanto": _quanto,
    "torchao": _torchao,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
}


def unquantized(source: Path, folder: Path) -> Any:
    """The 16-bit model in fp32 with what `folder` stores: plain tensors, decoded weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    wanted, decoded = model.state_dict(), weights(folder)
    for path in folder.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(path).items() if name in wanted}
        model.load_state_dict(
            {k: v for k, v in kept.items() if k.removesuffix(".weight") not in decoded},
            strict=False,
        )
    for name, weight in decoded.items():
        model.get_submodule(name).weight.data = weight.float()
    return model


def originals(source: Path) -> dict[str, torch.Tensor]:
    """The weights `(rows, columns)` of every layer to be quantized, fp64, by its module's name."""
    return {
        name.removesuffix(".weight"): tensor.double()
        for name, tensor in load_file(source / "model.safetensors").items()
        if ".layers." in name and tensor.ndim == 2
    }


def error(folder: Path, source: Path) -> float:
    """Norm of what all quantized layers are off by, as a share of their norm."""
    before, now = originals(source), weights(folder)
    return apart(now, {name: before[name] for name in now})


def apart(now: Mapping[str, torch.Tensor], then: Mapping[str, torch.Tensor]) -> float:
    """Norm of all differences, as a share of the norm of `then`."""
    assert now.keys() == then.keys()
    off = sum(float((now[name] - then[name]).square().sum()) for name in then)
    return sqrt(off / sum(float(each.square().sum()) for each in then.values()))


def expected_error(source: Path, bits: int, length: int | None, axis: int = 1) -> float:
    """`even_error` of a checkpoint's layers; `length` None: rows, with steps even about zero."""
    return even_error(originals(source), bits, length, axis, symmetric=length is None)


def even_error(
    layers: Mapping[str, torch.Tensor],
    bits: int,
    length: int | None,
    axis: int = 1,
    symmetric: bool = False,
) -> float:
    """`apart` for codes at equal steps over a group's range, each off by up to half a step.

    A step is (largest - smallest) / (2^bits - 1), and an error spread evenly over it has the root
    mean square step / sqrt(12). The range is twice the largest size where it is `symmetric` about
    zero. A group is `length` weights of a row (of a column: `axis` 0), or the row.
    """
    off = total = 0.0
    for weight in layers.values():
        size = weight.shape[1] if length is None else length
        groups = weight.reshape(-1, size) if axis == 1 else weight.reshape(size, -1).T
        span = 2 * groups.abs().amax(1) if symmetric else groups.amax(1) - groups.amin(1)
        off += float((span / (2**bits - 1)).square().sum()) / 12 * size
        total += float(weight.square().sum())
    return sqrt(off / total)
