"""Native checkpoints decoded bit by bit, without the libraries that write and read them.

A column of a `gptq` layer is one stream of codes, little end first, in 32-bit words; so is a row of
zero points, kept less one in the old form. `awq` keeps eight codes of a row in a word, in the order
of `_PLACES`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

Codes = np.ndarray[Any, np.dtype[Any]]
_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7], dtype=np.uint32)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The dequantized weights `(rows, columns)` of every packed layer, fp64."""
    stored = load_file(folder / "model.safetensors")
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    found = {}
    for name in names:
        parts = {key: stored[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales")}
        if told["quant_method"] == "awq":
            codes, zeros = _words(parts["qweight"]), _words(parts["qzeros"])
            groups = np.arange(len(codes)) // (len(codes) // len(zeros))
        else:
            bits = told["bits"]
            codes = _stream(parts["qweight"].numpy(), bits)
            less = 1 if told["checkpoint_format"] == "gptq" else 0
            zeros = _stream(parts["qzeros"].numpy().T, bits).T + less
            groups = stored[f"{name}.g_idx"].numpy()
        scales = parts["scales"].double().numpy()
        found[name] = torch.from_numpy(((codes - zeros[groups]) * scales[groups]).T.copy())
    return found


def _stream(words: Codes, bits: int) -> Codes:
    """Codes down each column of words."""
    places = np.arange(32, dtype=np.uint32)
    stream = (words.astype(np.uint32)[:, None, :] >> places[None, :, None]) & 1
    stream = stream.reshape(-1, bits, words.shape[1])
    return np.asarray((stream.astype(np.int64) << np.arange(bits)[None, :, None]).sum(1))


def _words(packed: torch.Tensor) -> Codes:
    """Codes along each row, eight a word."""
    words = packed.numpy().astype(np.uint32)
    codes = (words[:, :, None] >> (4 * _PLACES)[None, None, :]) & 15
    return codes.reshape(len(words), -1).astype(np.int64)
