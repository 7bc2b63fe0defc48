"""LoRA adapters of a model: where one lies, what identifies it, what a sweep says of it.

`adapter_fit` says whether one fits its model, `merging` applies it. Nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from qgrid import codec, hub, models
from qgrid.files import sha256
from qgrid.weights import headers

if TYPE_CHECKING:
    from qgrid.files import HashCache
    from qgrid.types import Cell, Model, Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FOLDER = "adapter"  # of an artifact whose adapter stays beside the weights
PACKAGES = ("peft",)
PLAIN_BASE = "16bit"  # `adapter_base` of an adapter that was trained on the 16-bit weights


def is_merged(model: Model) -> bool:
    """Whether an adapter goes into the 16-bit weights before anything else is done with them."""
    return model.adapter is not None and model.adapter_mode == "merged"


def is_attached(model: Model) -> bool:
    """Whether an adapter stays beside the quantized weights."""
    return model.adapter is not None and model.adapter_mode == "attached"


def packages(model: Model) -> tuple[str, ...]:
    """Distributions that a model needs for its adapter."""
    return () if model.adapter is None else PACKAGES


@cache
def merged(model: Model) -> Model:
    """The model with its adapter merged: what the other ways of carrying it compare with."""
    return replace(model, adapter_mode="merged") if is_attached(model) else model


@cache
def settled(model: Model) -> Model:
    """A model without an adapter has nothing else of one either: one cell for all such choices."""
    if model.adapter is not None:
        return model
    return replace(model, adapter_revision=None, adapter_mode="merged", adapter_base=None)


def short(adapter: str) -> str:
    """What labels call an adapter: the last part of its path or hub id."""
    return adapter.rstrip("/").rpartition("/")[2]


def label(model: Model) -> str:
    """What labels call a model: its name or hub id, and its adapter's."""
    name = model.id if model.name == "hf" else model.name
    return name if model.adapter is None else f"{name}+{short(model.adapter)}"


def resolve(model: Model) -> Path:
    """The local folder of the model's adapter; one on the hub is downloaded.

    Raises:
        ModelNotFound: a missing folder, one without an adapter, or a hub id that cannot be had.
    """
    asked = str(model.adapter)
    found = located(model)
    if found is not None:
        return found
    if models.is_path(asked):
        raise models.ModelNotFound(
            f"`model.adapter={asked}` is not a folder; give an existing folder or a hub id ORG/NAME"
        )
    return _download(model, offline=False)


def located(model: Model) -> Path | None:
    """The folder of the model's adapter where it is on this machine already, else None.

    Raises:
        ModelNotFound: a folder that holds no adapter.
    """
    asked = str(model.adapter)
    folder = Path(asked).expanduser()
    if asked and folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise models.ModelNotFound(
                f"`model.adapter={asked}` is a folder without `{CONFIG}`; give the folder of a "
                "LoRA adapter that PEFT saved"
            )
        return folder.resolve()
    if models.is_path(asked):
        return None
    try:
        return _download(model, offline=True)
    except models.ModelNotFound:
        return None


def identity(model: Model, cache: HashCache | None = None) -> dict[str, str]:
    """What of the adapter enters the artifact id; nothing of a model without one.

    The content of its files for a folder, id and revision for a hub id; and whether it is merged.
    On what it was trained is only said, and changes no number.
    """
    if model.adapter is None:
        return {}
    mode = {"adapter_mode": model.adapter_mode}
    if not models.is_path(model.adapter) and not Path(model.adapter).expanduser().is_dir():
        return {"adapter": model.adapter, "adapter_revision": str(model.adapter_revision), **mode}
    hashes = {
        path.name: cache.sha256(path) if cache else sha256(path) for path in files(resolve(model))
    }
    return {"adapter": codec.digest(hashes, 64), **mode}


def files(folder: Path) -> list[Path]:
    """The files of an adapter that are read."""
    return [folder / name for name in (CONFIG, WEIGHTS) if (folder / name).is_file()]


def num_parameters(model: Model) -> int:
    """Numbers of an adapter that is held beside the weights; 0 where there is none, or not here."""
    folder = located(model) if is_attached(model) else None
    try:
        found = () if folder is None else tensors(folder)
    except headers.TornFile:  # refused by name elsewhere
        return 0
    return sum(prod(tensor.shape) for tensor in found)


def tensors(folder: Path) -> tuple[Tensor, ...]:
    """The tensors of the adapter in a folder; none where it holds no adapter.

    Raises:
        TornFile: the file's length contradicts its header.
    """
    if not (folder / WEIGHTS).is_file():
        return ()
    return tuple(tensor for tensor, _ in headers.read_header(folder / WEIGHTS).values())


def unheard(model: Model) -> tuple[str, ...]:
    """A remark where keys of an adapter were given, and none to apply."""
    if settled(model) == model:
        return ()
    return ("`model.adapter` is null, so that the other keys `model.adapter_*` change nothing",)


def notes(cell: Cell) -> tuple[str, ...]:
    """A remark where the adapter was trained on other weights than it is applied to here."""
    model = cell.model
    if model.adapter is None or model.adapter_base is None:
        return ()
    onto = PLAIN_BASE if is_merged(model) or cell.bits >= 16 else cell.method.name
    if model.adapter_base == onto:
        return ()
    verb = "merged into" if is_merged(model) else "attached to"
    return (
        f"trained on another base: the adapter `{short(model.adapter)}` on "
        f"`{model.adapter_base}`, {verb} `{onto}` here",
    )


def _download(model: Model, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    asked, revision = str(model.adapter), model.adapter_revision
    try:
        folder = snapshot_download(
            asked,
            revision=revision,
            allow_patterns=[CONFIG, WEIGHTS, *models.TOKENIZER_FILES],
            local_files_only=offline,
        )
    except hub.errors() as error:
        raise models.ModelNotFound(
            f"`model.adapter={asked}` (revision {revision}) is neither a folder nor a hub id that "
            f"can be reached; give a folder or ORG/NAME ({type(error).__name__})"
        ) from error
    return Path(folder)
