"""Checkpoints of a method on the trained model, made once, and what is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qgrid import codec, registry
from qgrid.planning import plan
from qgrid.runtimes import transformers as runtime
from qgrid.types import Calibration, Cell, Method, Model
from tests import jobs

DEMO = Path(__file__).parents[2] / "qgrid" / "demo"
MODEL = DEMO / "model"
CALIBRATION = Calibration(
    "t", "package:qgrid.demo/slices/calibration.jsonl", None, None, "train", "text", 8, 128
)
Made = Callable[..., tuple[Path, Cell]]


def maker(make_cell: Callable[..., Cell], folder: Callable[[str], Path]) -> Made:
    """`made("hqq", 4, axis=0)`: the folder of that checkpoint, and its cell.

    `calibration` replaces the text of the methods that look at one.
    """
    known: dict[str, tuple[Path, Cell]] = {}

    def run(
        method: str, bits: int, calibration: Calibration = CALIBRATION, **changes: Any
    ) -> tuple[Path, Cell]:
        chosen = Method(method, jobs.options(method, **changes))
        calibrates = plan._calibrates(chosen, registry.support(chosen))
        cell = make_cell(
            model=Model("demo", str(MODEL), None, False, False),
            method=chosen,
            bits=bits,
            calibration=calibration if calibrates else None,
        )
        key = codec.dumps(cell)
        if key not in known:
            out = folder(method)
            registry.method(method).quantize(cell, MODEL, out)
            known[key] = out, cell
        return known[key]

    return run


@cache
def ids() -> tuple[int, ...]:
    """Tokens of the prose that the model was measured on, not trained on."""
    from transformers import AutoTokenizer

    text = (DEMO / "slices" / "prose.txt").read_text()[:3000]
    return tuple(AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"][:300])


Scored = tuple[torch.Tensor, dict[str, Any]]
_SCORED: dict[tuple[Path, str], Scored] = {}


def scored(made: tuple[Path, Cell], dtype: str = "float32") -> Scored:
    """Log-probabilities `(tokens - 1, vocab)` from the runtime, and what it observed; once each."""
    folder, cell = made
    if (folder, dtype) not in _SCORED:
        loaded = runtime.load(folder, cell, dtype)
        seen = dict(loaded.observed()) | {"weights_bytes": loaded.memory().weights_bytes}
        found = torch.cat([part.logprobs for part in loaded.score([ids()], [len(ids()) - 1])])
        loaded.close()
        _SCORED[folder, dtype] = found, seen
    return _SCORED[folder, dtype]


@cache
def base() -> torch.Tensor:
    """Log-probabilities of the 16-bit model, computed in fp32."""
    return computed({})


def computed(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The same with other weights in the layers of these names."""
    model = dense()
    with torch.no_grad():
        for name, weight in weights.items():
            place = model.get_submodule(name).weight
            place.copy_(weight.reshape(place.shape))
    return plainly(model)


def dense() -> Any:
    """The 16-bit model in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def plainly(model: Any) -> torch.Tensor:
    """Log-probabilities of one forward pass without cache."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids()])).logits[0, :-1]
    return torch.log_softmax(logits.float(), -1)


def divergence(found: torch.Tensor) -> float:
    """Mean KL divergence of `found` from the 16-bit model, in nats a token."""
    before = base().double()
    return float((before.exp() * (before - found.double())).sum(-1).mean())
