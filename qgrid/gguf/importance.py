"""The importance matrix: how strongly each input channel of a linear layer is driven."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.calibration import batches
from qgrid.calibration_texts import BadCalibration

if TYPE_CHECKING:
    import numpy as np
    import torch

_LEAST = 1e-6  # of a layer's mean importance


def collect(
    model: Any, rows: Sequence[Sequence[int]], tensors: Mapping[str, str]
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Mean of the squared inputs `(columns,)` of each linear layer over all tokens of `rows`.

    `tensors` maps the layers (modules of `model`) to the names under which they are returned. All
    rows are equally long. A channel that is never driven gets a millionth of the mean.

    Raises:
        BadCalibration: a layer whose inputs are all zero.
    """
    import torch

    with _listening(model, tensors) as sums, torch.inference_mode():
        device = model.get_input_embeddings().weight.device
        for part in batches(rows):
            model(torch.tensor(part, device=device), use_cache=False, logits_to_keep=1)
    count = sum(len(row) for row in rows)
    return {name: _floored((total / count).cpu().numpy(), name) for name, total in sums.items()}


def _floored(means: np.ndarray[Any, Any], tensor: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The means with a least value: where a whole block has none, the quantizer stores zeros."""
    import numpy as np

    least = _LEAST * means.mean()
    if not least > 0:
        raise BadCalibration(
            f"the calibration text never drives {tensor}; give another text or "
            "`method.imatrix=false`"
        )
    floored: np.ndarray[Any, np.dtype[np.float32]] = np.maximum(means, least).astype(np.float32)
    return floored


def load(source: Path, arguments: Mapping[str, Any], device: str) -> Any:
    """The checkpoint in fp32: what it computes here must not depend on 16-bit kernels."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {**arguments, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(source, **options).eval().to(device)


@contextlib.contextmanager
def _listening(model: Any, tensors: Mapping[str, str]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums of the squared inputs by tensor, while the block runs the model."""
    import torch

    sums: dict[str, torch.Tensor] = {}

    def listen(tensor: str) -> Any:
        def note(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            added = inputs[0].flatten(0, -2).float().square().sum(0, dtype=torch.float64)
            sums[tensor] = sums[tensor] + added if tensor in sums else added

        return note

    hooks = [
        model.get_submodule(module).register_forward_pre_hook(listen(tensor))
        for module, tensor in tensors.items()
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
