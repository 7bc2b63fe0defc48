"""Where a checkpoint folder that somebody else made is: on this machine, or on the hub."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from qgrid import hub, models, published
from qgrid.contracts import Unreachable, Unsupported
from qgrid.methods import _checkpoint
from qgrid.published import Config, Unreadable
from qgrid.types import Model
from qgrid.weights import headers

_WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # what transformers looks for


def _model(path: str) -> Model:
    """The folder or hub id as a model: `ORG/NAME` or `ORG/NAME@REVISION`."""
    here = local(path)
    name, _, revision = (path, "", "") if here is not None else path.partition("@")
    return Model("published", str(here or name), revision or None, False, False)


def local(path: str) -> Path | None:
    """A folder with a config, here or in a folder given by `--config-dir`."""
    try:
        return models.resource(f"{path}/config.json").parent
    except FileNotFoundError:
        return None


def on_hub(path: str) -> bool:
    """Whether a path can be an id of the hub: two parts, and no sign of a file."""
    plain = not path.startswith((".", "/", "~")) and ":" not in path and not Path(path).is_dir()
    return plain and path.partition("@")[0].count("/") == 1 and not path.endswith(".gguf")


def located(path: str) -> Path | None:
    """The checkpoint where it is on this machine already, without network."""
    if local(path) is None and not on_hub(path):
        return None
    return models.located(_model(path))


def config(path: str) -> Config | None:
    """Its `config.json`: from the folder, else from the hub alone, once.

    Raises:
        Unreadable: it is no JSON object.
        Unreachable: the hub does not answer.
    """
    folder = located(path)
    if folder is not None and (folder / published.FILE).is_file():
        return published.read(folder)
    if not on_hub(path):
        return None
    found = _config_of_hub(path)
    if isinstance(found, Exception):
        raise found
    return found


@cache
def _config_of_hub(path: str) -> Config | Unreadable | Unreachable | None:
    """A file of few bytes, kept out of the hub's cache, which must not hold half a checkpoint.

    What went wrong is kept as well: many ask, and each would wait for the network.
    """
    from huggingface_hub import hf_hub_download

    named = _model(path)
    with TemporaryDirectory() as aside:
        try:
            hf_hub_download(named.id, published.FILE, revision=named.revision, local_dir=aside)
        except hub.errors() as error:
            found = hub.failure(error, path, missing(path))
            return found if isinstance(found, Unreachable) else None
        try:
            return published.read(Path(aside))
        except Unreadable as error:
            return error


def fetched(path: str) -> Path:
    """The checkpoint's folder with all its weights, from the network where it must be.

    Raises:
        Unsupported: there is none, or its weights cannot be used.
        Unreachable: the hub does not answer.
    """
    if (here := local(path)) is not None:
        return here
    if not on_hub(path):
        raise Unsupported(missing(path))
    folder = located(path)
    if folder is None or fault(path, folder) is not None:
        try:
            folder = models.completed(_model(path))
        except hub.errors() as error:  # `ModelNotFound`, with the library's error below it
            raise hub.failure(error.__cause__ or error, path, missing(path)) from error
    if (lacking := _unfetched(path, folder)) is not None:
        raise Unreachable(
            f"`method.path={path}` has not `{lacking}` in the hub's cache, which its index names, "
            "and it could not be fetched; run again when the hub can be reached"
        )
    _checkpoint.refuse(fault(path, folder))
    return folder


def missing(path: str) -> str:
    return (
        f"`method.path={path}` is neither a `.gguf` file, nor a folder with a `config.json`, nor "
        "an id on the hub that can be reached; give a path, ORG/NAME or ORG/NAME@REVISION"
    )


def fault(path: str, folder: Path) -> str | None:
    """Why weights on this machine cannot be used."""
    if not any((folder / name).is_file() for name in (_WHOLE, INDEX)):
        return (
            f"`method.path={path}` has no `{_WHOLE}` and no index of parts, so transformers "
            "does not load it; convert its weights to safetensors of that name"
        )
    try:
        if (lacking := _lacking(folder)) is not None:
            return (
                f"`method.path={path}` has no `{lacking}`, which its `{INDEX}` names; get the "
                "whole checkpoint"
            )
        headers.read_headers(folder)
    except (Unreadable, headers.TornFile) as error:
        said = error if isinstance(error, Unreadable) else f"is not whole: {error}"
        return f"`method.path={path}` {said}; get the checkpoint again"
    return None


def _unfetched(path: str, folder: Path) -> str | None:
    """What of a checkpoint on the hub could not be had.

    Raises:
        Unsupported: its index cannot be read.
    """
    try:
        return _lacking(folder)
    except Unreadable:
        raise Unsupported(str(fault(path, folder))) from None


def _lacking(folder: Path) -> str | None:
    """The first file that the index names and the folder does not hold."""
    if not (folder / INDEX).is_file() or (folder / _WHOLE).is_file():
        return None
    named = sorted(set(published.parts(folder, INDEX)))
    return next((name for name in named if not (folder / name).is_file()), None)
