"""The distributions of a checkpoint in transformers against those of its GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.gguf import _library, _probes, vocabulary
from qgrid.gguf import file as gguf_file

if TYPE_CHECKING:
    import torch

_TOKENS = 384
_EMBEDDING = "token_embd.weight"


def stored_dtype(file: Path) -> str:
    """The type of the file's embedding, which a 16-bit file has in all matrices."""
    return gguf_file.read(file).tensors[_EMBEDDING].type.name


def lacking_memory(file: Path, source: Path) -> str | None:
    """Why both models do not fit into the free memory; None: they do."""
    import psutil

    stored = gguf_file.read(file)
    weights = sum(tensor.num_weights for tensor in stored.tensors.values())
    rows = stored.tensors[_EMBEDDING].shape[0]
    needed = 2 * 4 * weights + file.stat().st_size + 3 * 4 * _TOKENS * rows
    free = int(psutil.virtual_memory().available)
    if needed <= free:
        return None
    return f"{needed / 2**30:.1f} GiB needed for {source.name}, {free / 2**30:.1f} free"


@dataclass(frozen=True)
class Comparison:
    """Mean KL in nats a token: of llama.cpp, and where that is much of 16-bit arithmetic."""

    divergence: float
    tokens: int
    arithmetic: float | None  # of transformers computing in 16 bits; None: not needed


def compare(
    file: Path, source: Path, dtype: str, bound: float, trust_remote_code: bool
) -> Comparison:
    """Compare both models; `arithmetic` is measured where the divergence exceeds `bound`."""
    import torch

    ids = _ids(source)
    model = _load(source, dtype, trust_remote_code)
    reference = _forward(model, ids)
    total, row = 0.0, 0
    with _library.model(file) as loaded:
        for logits in _library.logits(loaded, ids, torch.get_num_threads()):
            rows = torch.from_numpy(logits)
            total += _divergence(reference[row : row + len(rows)], rows)
            row += len(rows)
    divergence = total / len(ids)
    if divergence <= bound:
        return Comparison(divergence, len(ids), None)
    rounded = _forward(model.to(_narrow(dtype) or torch.float16), ids)
    return Comparison(divergence, len(ids), _divergence(reference, rounded) / len(ids))


def _ids(source: Path) -> list[int]:
    """Prose as ids; a vocabulary that knows little makes more, a short context takes fewer."""
    tokenizer = vocabulary.load_tokenizer(source)
    ids: list[int] = tokenizer(_probes.PROSE)["input_ids"]
    return ids[: min(_TOKENS, _positions(source))]


def _positions(source: Path) -> int:
    from qgrid import models

    return int(models.architecture(source)["positions"])


def _load(source: Path, dtype: str, trust_remote_code: bool) -> Any:
    """The model in fp32, its matrices rounded as the file does; the rest is F32 in it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
    ).eval()
    narrow = _narrow(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and narrow is not None:
                weight.copy_(weight.to(narrow).float())
    return model


def _narrow(dtype: str) -> torch.dtype | None:
    import torch

    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(dtype)


def _forward(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits `(tokens, vocab)` of one sequence."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def _divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Sum over rows of KL(reference || found), in fp64 a few rows at a time."""
    return sum(_rows_divergence(*rows) for rows in _slices(reference, found))


def _slices(
    reference: torch.Tensor, found: torch.Tensor, rows: int = 32
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(reference), rows):
        yield reference[start : start + rows].double(), found[start : start + rows].double()


def _rows_divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    import torch

    expected, actual = torch.log_softmax(reference, -1), torch.log_softmax(found, -1)
    return float((expected.exp() * (expected - actual)).sum())
