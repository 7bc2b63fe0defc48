"""W8A8 by hand: weights as stored, activations rounded with a scale a token, all in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

INT8_LEVELS = 127.0  # of vLLM; compressed-tensors divides by 127.5
FP8_LEVELS = 448.0  # the largest number of E4M3


class Rounded(torch.nn.Module):
    """A linear layer; `levels` is what the largest activation of a token becomes."""

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, levels: float, push: float
    ) -> None:
        super().__init__()
        self._weight = codes.float() * scales.float().reshape(-1, 1)
        self._levels = levels
        self._push = push

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._push:
            x = x * (1 + self._push * torch.randn_like(x))
        scale = x.abs().amax(-1, keepdim=True) / self._levels
        if self._levels == FP8_LEVELS:
            codes = (x / scale).clamp(-FP8_LEVELS, FP8_LEVELS).to(torch.float8_e4m3fn).float()
        else:
            codes = torch.round(x / scale).clamp(-128, 127)
        return (codes * scale) @ self._weight.T


def rounded_model(folder: Path, levels: float, push: float = 0.0) -> Any:
    """The checkpoint's model with every quantized layer in its place; `push` is relative noise."""
    torch.manual_seed(0)
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if f"{name}.weight_scale" in stored and isinstance(module, torch.nn.Linear):
            parent, _, last = name.rpartition(".")
            codes, scales = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
            setattr(model.get_submodule(parent), last, Rounded(codes, scales, levels, push))
    return model
