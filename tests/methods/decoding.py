"""Checkpoints of hqq, optimum-quanto and torchao decoded by hand, without those libraries.

Codes narrower than a byte lie in bytes (three bits: ten in a word of 32) by whole blocks of rows:
the first block in the highest bits of every byte for hqq, in the lowest for quanto.
"""

from __future__ import annotations

import json
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
    decode = {"hqq": _hqq, "quanto": _quanto, "torchao": _torchao}[told["quant_method"]]
    marks = (".W_q", ".weight._scale", "._weight_scale")
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


def unquantized(source: Path, folder: Path) -> Any:
    """The 16-bit model in fp32 with the decoded weights of `folder` in their places."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name, weight in weights(folder).items():
        model.get_submodule(name).weight.data = weight.float()
    return model


def error(folder: Path, source: Path) -> float:
    """Norm of what all quantized layers are off by, as a share of their norm."""
    before = load_file(source / "model.safetensors")
    pairs = [
        (weight, before[f"{name}.weight"].double()) for name, weight in weights(folder).items()
    ]
    off = sum(float((now - then).square().sum()) for now, then in pairs)
    return sqrt(off / sum(float(then.square().sum()) for _, then in pairs))


def expected_error(source: Path, bits: int, length: int | None, axis: int = 1) -> float:
    """The same for codes at equal steps over a group's range, each off by up to half a step.

    A step is (largest - smallest) / (2^bits - 1), and an error spread evenly over it has the root
    mean square step / sqrt(12). `length` None: steps of a whole row, symmetric about zero.
    """
    off = total = 0.0
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".layers." not in name or tensor.ndim != 2:
            continue
        weight = tensor.double()
        if length is None:
            span = 2 * weight.abs().amax(1)
            count = weight.shape[1]
        else:
            groups = weight.reshape(-1, length) if axis == 1 else weight.reshape(length, -1).T
            span, count = groups.amax(1) - groups.amin(1), length
        off += float((span / (2**bits - 1)).square().sum()) / 12 * count
        total += float(weight.square().sum())
    return sqrt(off / total)
