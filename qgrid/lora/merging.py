"""Applying a LoRA adapter with PEFT: merged into a folder of weights, or live in a loaded model."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import models
from qgrid.contracts import InvalidEngine
from qgrid.lora import adapter_fit, adapter_probe, adapters
from qgrid.methods import _checkpoint
from qgrid.types import Check
from qgrid.weights import headers
from qgrid.weights.finite import nonfinite

if TYPE_CHECKING:
    import torch

    from qgrid.types import Cell

# Largest difference of logits in fp32 between the layers beside each other and their sum, as a
# share of the largest logit: the order of additions alone differs. Seen: 1e-6 for 5 layers.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Merged:
    """What merging found. `reference` holds fp32 logits of `probe` from the merged 16-bit model."""

    checks: tuple[Check, ...]
    probe: tuple[int, ...]
    reference: torch.Tensor


def merge(cell: Cell, base: Path, into: Path) -> Merged:
    """Write the checkpoint in `base` with the cell's adapter merged into it to the folder `into`.

    The sum is taken in fp32 and rounded once to the dtype that each tensor has in the files. What
    the adapter does not change keeps its bytes; other files are links to the base's.

    Raises:
        ModelNotFound: the adapter cannot be had.
        Unsupported: it does not fit, or the base is already quantized.
    """
    _checkpoint.refuse_quantized(base)
    found = _fitting(cell)
    ids = _checkpoint.probe(base, cell)
    model = _checkpoint.load_16bit(base, cell.model, dtype=_float32())
    before = _checkpoint.logits(model, ids)
    wrapped = _wrapped(model, adapters.resolve(cell.model), found)
    beside = _checkpoint.logits(model, ids)
    model = wrapped.merge_and_unload(safe_merge=True)
    summed = _checkpoint.logits(model, ids)
    weights = {f"{layer}.weight": model.get_submodule(layer).weight for layer in found.layers}
    _write(base, into, weights)
    _narrow(model, _checkpoint.dtype_16bit(base))
    checks = (_check_sum(beside, summed), _check_effect(before, summed, len(found.layers)))
    return Merged(checks, ids, _checkpoint.logits(model, ids))


def keep(cell: Cell, folder: Path, base: Path) -> tuple[Check, ...]:
    """Copy the cell's adapter into the artifact in `folder` of `base`, where `attach` finds it.

    Raises:
        ModelNotFound: the adapter cannot be had.
        Unsupported: it does not fit.
    """
    _fitting(cell)
    target = folder / adapters.FOLDER
    target.mkdir()
    for path in adapters.files(adapters.resolve(cell.model)):
        shutil.copyfile(path, target / path.name)
    wrong = nonfinite(target / adapters.WEIGHTS)
    goal = "no NaN or infinity in the adapter"
    told = "; ".join(f"{count} in {name}" for name, count in wrong.items()) or goal
    finite = Check("adapter_finite", not wrong, goal, told)
    return finite, adapter_probe.check_inputs(folder, base)


def attach(model: Any, artifact: Path, method: str, dtype: str) -> Check:
    """Put the adapter in an artifact beside the layers that `method` made, computing in `dtype`.

    The model itself stays what it is: its layers are replaced by ones that hold them. The check
    tells how well one layer of each class adds the adapter's product.

    Raises:
        InvalidEngine: PEFT wrapped other layers than the adapter has, or a layer does not add
            the adapter's product.
        Unfit: the adapter's files are not what was kept.
    """
    import torch

    folder = artifact / adapters.FOLDER
    found = adapter_fit.read(folder)
    _wrapped(model, folder, found)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.eval()
    return adapter_probe.check_products(model, method, folder, found, dtype)


def _fitting(cell: Cell) -> adapter_fit.Fit:
    """The adapter, once it is known to fit: a plan may not have had the files."""
    folder = adapters.resolve(cell.model)
    _checkpoint.refuse(adapter_fit.refusal(cell.model))
    return adapter_fit.read(folder)


def _wrapped(model: Any, folder: Path, found: adapter_fit.Fit) -> Any:
    """The PEFT model around `model`, which it changes in place.

    PEFT is given only what a plain LoRA needs, so that nothing else in the file can do anything.

    Raises:
        InvalidEngine: PEFT wrapped other layers than the adapter has.
    """
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    config = found.config
    plain = LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        target_modules=sorted(found.layers),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with _no_needless_imports():
        wrapped = PeftModel.from_pretrained(model, str(folder), config=plain)
    wrapped.eval()
    live = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if live != found.layers.keys():
        other = min(live ^ found.layers.keys())
        raise InvalidEngine(
            f"the adapter has {len(found.layers)} layers and {len(live)} are wrapped (`{other}`)"
        )
    return wrapped


@contextlib.contextmanager
def _no_needless_imports() -> Iterator[None]:
    """PEFT 0.21.2 imports gptqmodel where it is installed, to ask whether a layer is one of its.

    That takes seconds and 146 MiB, which would count as the engine's memory. A layer can only be
    one of a library that is loaded.
    """
    from peft.tuners.lora import awq, gptq
    from peft.utils import other

    asked, places = "is_gptqmodel_available", (awq, gptq, other)
    before = [getattr(place, asked) for place in places]
    for place in places:
        setattr(place, asked, lambda: "gptqmodel" in sys.modules)
    try:
        yield
    finally:
        for place, own in zip(places, before, strict=True):
            setattr(place, asked, own)


def _write(base: Path, into: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """The files of `base` with some of its tensors replaced."""
    from safetensors.torch import load_file, save_file

    changed = {path for path in headers.weight_files(base) if weights.keys() & _names(path)}
    for path in models.checkpoint_files(base):
        if path not in changed:
            (into / path.name).symlink_to(path.resolve())
            continue
        stored = load_file(path)
        for name in weights.keys() & stored.keys():
            stored[name] = weights[name].detach().to(stored[name].dtype).contiguous()
        save_file(stored, into / path.name, metadata={"format": "pt"})


def _names(path: Path) -> set[str]:
    return set(headers.read_header(path))


def _narrow(model: Any, dtype: torch.dtype) -> None:
    """Every parameter in 16 bits, as a load of the files gives it; buffers stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _check_sum(beside: torch.Tensor, summed: torch.Tensor) -> Check:
    """The merged weights compute what the adapter beside the weights does."""
    apart, largest = float((beside - summed).abs().max()), float(beside.abs().max())
    ok = apart <= _TOLERANCE * largest  # false for NaN too
    goal = f"fp32 logits at most {_TOLERANCE * largest:.2g} from the adapter beside the weights"
    return Check("adapter_merged", ok, goal, f"{apart:.3g} apart")


def _check_effect(before: torch.Tensor, after: torch.Tensor, layers: int) -> Check:
    """Merging changed the model; an adapter that was never trained does not."""
    apart = float((before - after).abs().max())
    goal = f"other logits than the base's, by {layers} layers"
    return Check("adapter_effect", apart > 0, goal, f"{apart:.3g} apart", fatal=False)


def _float32() -> torch.dtype:
    import torch

    return torch.float32


def own(folder: Path, source: Path) -> None:
    """Give a folder its own copy of what it links to in `source`, which will be gone."""
    for path in folder.iterdir():
        target = path.resolve()
        if path.is_symlink() and target.is_relative_to(source.resolve()):
            path.unlink()
            try:
                path.hardlink_to(target)
            except OSError:  # another file system
                shutil.copyfile(target, path)
