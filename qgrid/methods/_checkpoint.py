"""Steps that every method shares: load the 16-bit model, keep its tokenizer, probe the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qgrid import models, registry
from qgrid.contracts import Unsupported
from qgrid.libraries import gptq_kernels, loading
from qgrid.weights import inspection

if TYPE_CHECKING:
    import torch

    from qgrid.types import Cell, Model

PROBE_TOKENS = 48
PROBE_TEXT = (
    "Question: what is 12 + 34?\nAnswer: 46.\n"
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}\n'
    "def double(x):\n    return 2 * x\n"
    "The quick brown fox jumps over the lazy dog while the rain keeps falling on the old town."
)


def refuse_quantized(source: Path) -> None:
    """Refuse a source that is not a 16- or 32-bit checkpoint.

    Raises:
        Unsupported: the source is already quantized.
    """
    refuse(inspection.already_quantized(source, str(source)))


def refuse(reason: str | None) -> None:
    """Refuse for a reason, if there is one.

    Raises:
        Unsupported: there is.
    """
    if reason is not None:
        raise Unsupported(reason)


def load_16bit(source: Path, model: Model, **arguments: Any) -> Any:
    """The source model in its stored 16-bit dtype; a 32-bit checkpoint becomes bf16."""
    options = models.load_options(model) | {"dtype": dtype_16bit(source)} | arguments
    return loading.pretrained(source, options).eval()


def dtype_16bit(source: Path) -> torch.dtype:
    """The dtype that a source is quantized from."""
    import torch

    return torch.float16 if _is_half(source) else torch.bfloat16


def is_16bit(source: Path) -> bool:
    """Whether every stored weight is bf16 or fp16 in safetensors."""
    dtypes = {tensor.dtype for tensor in inspection.read_headers(source).values()}
    return bool(dtypes) and dtypes <= inspection.FLOATS_16


def _is_half(source: Path) -> bool:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("dtype", config.get("torch_dtype")) == "float16")


def stored_dtype(source: Path) -> Literal["F16", "BF16", "F32"]:
    """The narrowest dtype that holds every stored weight as it is."""
    dtypes = {tensor.dtype for tensor in inspection.read_headers(source).values()}
    if dtypes == {"BF16"}:
        return "BF16"
    return "F16" if dtypes == {"F16"} else "F32"


def copy_configs(source: Path, out: Path) -> None:
    """Copy `config.json`, and how to generate where the checkpoint says it."""
    for name in models.CONFIG_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer byte for byte (a library that saves it again may change it), and code."""
    for path in models.checkpoint_files(source):
        if path.name in models.TOKENIZER_FILES or path.suffix == ".py":
            shutil.copyfile(path, out / path.name)


def probe(source: Path, cell: Cell) -> tuple[int, ...]:
    """Token ids that the reload check feeds: ordinary text, seeded ids where it is too short."""
    ids = list(tokenizer(source, cell.model)(PROBE_TEXT)["input_ids"])
    vocab = int(models.architecture(source)["vocab"])
    spread = [(7919 * (i + 1)) % vocab for i in range(PROBE_TOKENS)]
    return tuple((ids + spread)[:PROBE_TOKENS])


def tokenizer(source: Path, model: Model) -> Any:
    """The tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)


def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits `(tokens, vocab)` of one sequence, fp32 on the CPU, computed as the model is."""
    import torch

    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        output = model(torch.tensor([list(ids)], device=device), use_cache=False)
    result: torch.Tensor = output.logits[0].float().cpu()
    return result


def reload(folder: Path, cell: Cell) -> Any:
    """The checkpoint as a runtime would find it, in its stored dtype.

    Where several kernels multiply it, by the one that the model in memory has.
    """
    kernel = gptq_kernels.asked(folder, gptq_kernels.PLAIN, "auto", cell.gpu.kind)
    arguments = {"dtype": "auto", **models.load_options(cell.model), **kernel}
    return registry.loader(cell.method)(folder, arguments)
