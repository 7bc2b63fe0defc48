"""Checkpoints as others publish them: qgrid's own without its manifest, and AQLM by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qgrid import codec, models, registry
from qgrid.types import Cell, Job
from qgrid.weights import artifacts, inspection
from tests import jobs

Values = np.ndarray[Any, Any]
RUN = 8  # weights that one code stands for
ENTRIES = 256


def stripped(
    make: Callable[..., Cell], store: Path, model: Path, method: str, bits: int, **changes: Any
) -> Path:
    """A checkpoint of one of qgrid's methods, without what only qgrid writes."""
    job = jobs.job(make, store, model, method, bits, **changes)
    artifacts.build(job)
    folder = Path(job.artifact)
    (folder / artifacts.MANIFEST).unlink()
    return folder


def job(
    make: Callable[..., Cell], store: Path, model: Path, method: str, path: Path | str, **more: Any
) -> Job:
    """The artifact job of a published checkpoint; its width is its own."""
    module: Any = registry.method(method)
    asked = jobs.options(method, path=str(path), **more)
    options = codec.plain(codec.convert(module.Options, asked))
    width = module.option_bits(options)
    made = jobs.job(make, store, model, method, 4 if width is None else width)
    chosen = replace(made.planned.cell.method, options=options)
    cell = replace(made.planned.cell, method=chosen)
    return replace(made, planned=replace(made.planned, cell=cell))


def changed(source: Path, into: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint whose tensors were changed."""
    shutil.copytree(source, into)
    tensors = load_file(into / "model.safetensors")
    change(tensors)
    (into / "model.safetensors").unlink()
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    return into


def split(folder: Path) -> None:
    """Write a checkpoint's tensors into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index: dict[str, str] = {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    told = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))


def configured(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a folder's config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.unlink()
    path.write_text(json.dumps(config))


def write_nf4(base: Path, folder: Path, storage: str) -> Path:
    """What transformers and bitsandbytes write, codes in the dtype that `storage` names."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=getattr(torch, storage),
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    for name in models.TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    return folder


# --- AQLM ----------------------------------------------------------------------------------------


def write_aqlm(base: Path, folder: Path, books: int = 2) -> Path:
    """The 2x8 checkpoint of `base`, codebooks drawn from its own weights instead of trained.

    As published ones do, its config names weights among what is not quantized.
    """
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    linears = inspection.decoder_linears(inspection.read_headers(base))
    generator = np.random.default_rng(0)
    for name in linears:
        weight = tensors.pop(f"{name}.weight").float().numpy()
        parts = encoded(weight, books, generator)
        tensors |= {f"{name}.{key}": torch.from_numpy(value) for key, value in parts.items()}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = {
        "quant_method": "aqlm",
        "in_group_size": RUN,
        "out_group_size": 1,
        "num_codebooks": books,
        "nbits_per_codebook": 8,
        "linear_weights_not_to_quantize": ["model.embed_tokens.weight", "lm_head.weight"],
    }
    configured(folder, lambda config: config.update(quantization_config=told))
    return folder


def encoded(weight: Values, books: int, generator: np.random.Generator) -> dict[str, Values]:
    """Codes, codebooks and scales: each book holds rests of the books before it."""
    sizes = np.sqrt((weight**2).mean(1))
    scales = np.where(sizes == 0, 1, sizes)[:, None, None, None].astype(np.float16)
    rest = (weight / scales[:, :, 0, 0].astype(np.float32)).reshape(-1, RUN)
    entries, codes = [], []
    for _ in range(books):
        drawn = generator.choice(len(rest), ENTRIES, replace=False)
        book = rest[drawn].astype(np.float16)
        near = (rest**2).sum(1)[:, None] - 2 * rest @ book.T.astype(np.float32)
        chosen = (near + (book.astype(np.float32) ** 2).sum(1)).argmin(1)
        rest = rest - book[chosen].astype(np.float32)
        entries.append(book[:, None, :])
        codes.append(chosen.reshape(len(weight), -1))
    return {
        "codes": np.stack(codes, -1).astype(np.uint8).view(np.int8),
        "codebooks": np.stack(entries),
        "scales": scales,
    }


def plain_aqlm(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weights of one layer, entry by entry, fp32."""
    codes = stored[f"{name}.codes"].long() & 255
    books = stored[f"{name}.codebooks"].float()
    rows, runs, count = codes.shape
    found = torch.zeros(rows, runs * RUN)
    for run in range(runs):
        for book in range(count):
            found[:, run * RUN : (run + 1) * RUN] += books[book, codes[:, run, book], 0]
    scaled: torch.Tensor = found * stored[f"{name}.scales"].float().reshape(rows, 1)
    return scaled
