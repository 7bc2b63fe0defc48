"""Muon for the matrices of the layers, AdamW for embedding and norms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack: Tensor, rounds: int = 5) -> Tensor:
    """Nearest orthogonal matrices, approximately, of a stack [num, rows, columns]."""
    a, b, c = NEWTON_SCHULZ
    wide = stack.shape[1] <= stack.shape[2]
    x = (stack if wide else stack.mT).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x if wide else x.mT
    return found.float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, matrix by matrix."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices, those of equal shape together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for param in group["params"]:
                by_shape[param.shape].append(param)
            for shape, params in by_shape.items():
                updates = orthogonalize(torch.stack([self._nesterov(p, group) for p in params]))
                size = float(max(1.0, shape[0] / shape[1]) ** 0.5)
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["decay"])
                    param.add_(update, alpha=-group["lr"] * size)

    def _nesterov(self, param: nn.Parameter, group: dict[str, float]) -> Tensor:
        """The gradient, looked ahead along its momentum."""
        if param.grad is None:
            raise RuntimeError("a matrix has no gradient; every layer takes part in every batch")
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(param.grad, 1 - group["momentum"])
        return param.grad.lerp(momentum, group["momentum"])


def optimizers(
    network: nn.Module, matrix_lr: float, other_lr: float
) -> tuple[Muon, torch.optim.AdamW]:
    """Both optimizers; each group remembers its full rate as `base_lr`."""
    named = list(network.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, matrix_lr)
    adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for group in (*muon.param_groups, *adam.param_groups):
        group["base_lr"] = group["lr"]
    return muon, adam
