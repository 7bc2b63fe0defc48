"""Where a checkpoint lies, what identifies it, what its config says; nothing heavy is imported."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import codec, demo, hub
from qgrid.files import sha256

if TYPE_CHECKING:
    from qgrid.files import HashCache
    from qgrid.types import Model

EMBEDDED = "qgrid/tiny"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
CONFIG_FILES = ("config.json", "generation_config.json")
_SAFE = ("*.safetensors", "*.safetensors.index.json")
_PICKLED = ("*.bin", "*.bin.index.json")
_SIZES = {
    "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
}  # fmt: skip


class ModelNotFound(FileNotFoundError):
    """No such checkpoint; the message says what was asked for and what is allowed."""


def resolve(model: Model) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded when it is not in the cache.

    Raises:
        ModelNotFound: a missing folder, or a hub id that cannot be had.
    """
    folder = located(model)
    if folder is not None:
        return folder
    if is_path(model.id):
        raise ModelNotFound(
            f"`model.id={model.id}` is not a folder; give an existing folder or a hub id ORG/NAME"
        )
    return _download(model, offline=False)


def described(model: Model, into: Path) -> Path:
    """A folder with the configuration and the tokenizer, where nobody needs the weights.

    Of a hub id that is not on this machine only these are fetched, into `into`: the hub's cache
    must not hold half a checkpoint.

    Raises:
        ModelNotFound: as `resolve`.
    """
    folder = located(model)
    if folder is not None or is_path(model.id):
        return resolve(model)
    return _download(model, offline=False, into=into)


def located(model: Model) -> Path | None:
    """The folder of a checkpoint that is on this machine already, without network; else None.

    Raises:
        ModelNotFound: a folder that holds no checkpoint.
    """
    if model.id == EMBEDDED:
        return demo.MODEL_DIR if (demo.MODEL_DIR / "config.json").is_file() else None
    folder = Path(model.id).expanduser()
    if model.id and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"`model.id={model.id}` is a folder without `config.json`; give the folder of a "
                "checkpoint"
            )
        return folder.resolve()
    if is_path(model.id):
        return None
    try:
        return _download(model, offline=True)
    except ModelNotFound:
        return None


def known(model: Model) -> Path | None:
    """The same, where `config.json` is there as well: a hub's cache may hold other files only."""
    folder = located(model)
    return folder if folder is not None and (folder / "config.json").is_file() else None


def completed(model: Model) -> Path:
    """The folder of a hub id, with every file that its cache does not hold yet.

    Raises:
        ModelNotFound: it cannot be had; the hub's own error is its cause.
    """
    return _download(model, offline=False)


def identity(model: Model, cache: HashCache | None = None) -> dict[str, str]:
    """What of the model enters the artifact id.

    The content of the files for the embedded model and a local folder, wherever it lies; id and
    revision for a hub id, which may not have been downloaded yet, and whether its code may run.
    """
    local = model.id == EMBEDDED or is_path(model.id) or Path(model.id).expanduser().is_dir()
    if not local:
        runs = {"trust_remote_code": "yes"} if model.trust_remote_code else {}
        return {"id": model.id, "revision": str(model.revision), **runs}
    folder = resolve(model)
    hashes = {
        path.name: cache.sha256(path) if cache else sha256(path)
        for path in checkpoint_files(folder, model.allow_pickle)
    }
    return {"files": codec.digest(hashes, 64)}


def checkpoint_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The files of a checkpoint that a loader reads: weights, configs, tokenizer, own code."""
    patterns = (
        *_SAFE,
        *(_PICKLED if allow_pickle else ()),
        *CONFIG_FILES,
        *TOKENIZER_FILES,
        "*.py",
    )
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def load_options(model: Model) -> dict[str, Any]:
    """Arguments of `from_pretrained` that keep foreign code and pickles out unless allowed."""
    safe = None if model.allow_pickle else True
    return {"trust_remote_code": model.trust_remote_code, "use_safetensors": safe}


def resource(path: str) -> Path:
    """A file that a config names.

    `package:NAME/FILE` lies in a Python package; a relative path in the working folder or in one
    of the folders given by `--config-dir`.

    Raises:
        FileNotFoundError: one sentence with the places that were looked at.
    """
    if path.startswith("package:"):
        package, _, rest = path.removeprefix("package:").partition("/")
        places = [_inside(package, path) / rest]
    else:
        wanted = Path(path).expanduser()
        extra = [Path(root) for root in os.environ.get("QGRID_CONFIG_DIR", "").split(":") if root]
        roots = [Path.cwd(), *extra]
        places = [wanted] if wanted.is_absolute() else [root / wanted for root in roots]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise FileNotFoundError(f"no file `{path}` (looked for {looked}); correct the path")


def _inside(package: str, path: str) -> Path:
    try:
        return Path(str(files(package)))
    except (ModuleNotFoundError, ValueError):
        raise FileNotFoundError(
            f"no file `{path}`: there is no package `{package}`; correct the path or install it"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint.

    Raises:
        ValueError: it is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); get the checkpoint again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} should hold an object; get the checkpoint again")
    return config


def architecture(folder: Path) -> dict[str, Any]:
    """Sizes from `config.json`, and the number of parameters (tied embeddings once) from the files.

    Keys: model_type, layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, positions,
    tied, dtype, num_parameters (None where the folder has no safetensors).

    Raises:
        ValueError: a size is no positive number.
    """
    config = read_config(folder)
    text = config.get("text_config", config)
    for key in _SIZES & text.keys():
        if text[key] is not None and (type(text[key]) is not int or text[key] < 1):
            raise ValueError(
                f"{folder / 'config.json'} has `{key}={text[key]}`, which should be a whole number "
                "above 0; get the checkpoint again"
            )
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    return {
        "model_type": text.get("model_type", config.get("model_type")),
        "layers": text["num_hidden_layers"],
        "hidden": hidden,
        "intermediate": text.get("intermediate_size"),
        "heads": heads,
        "kv_heads": text.get("num_key_value_heads", heads),
        "head_dim": text.get("head_dim") or hidden // heads,
        "vocab": text["vocab_size"],
        "positions": text.get("max_position_embeddings"),
        "tied": tied(config),
        "dtype": config.get("dtype", config.get("torch_dtype")),
        "num_parameters": _num_parameters(folder),
    }


def tied(config: dict[str, Any]) -> bool:
    """Whether the output head shares the embedding's weights (transformers' default: no)."""
    text = config.get("text_config", config)
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _num_parameters(folder: Path) -> int | None:
    from qgrid.weights import inspection

    tensors = inspection.read_headers(folder)
    return inspection.num_parameters(folder, tensors) if tensors else None


def is_path(name: str) -> bool:
    """Whether an id can only be a path: hub ids have one slash and no leading `.`, `/` or `~`."""
    return not name or name.startswith((".", "/", "~")) or name.count("/") > 1


def _download(model: Model, offline: bool, into: Path | None = None) -> Path:
    """From the hub or its cache; `into`: all but the weights, into a folder of their own."""
    from huggingface_hub import snapshot_download

    patterns = [*CONFIG_FILES, *TOKENIZER_FILES]
    patterns += _SAFE if into is None else ()
    patterns += _PICKLED if model.allow_pickle and into is None else ()
    patterns += ("*.py",) if model.trust_remote_code else ()
    try:
        folder = snapshot_download(
            model.id,
            revision=model.revision,
            allow_patterns=patterns,
            local_files_only=offline,
            local_dir=into,
        )
    except hub.errors() as error:
        raise ModelNotFound(
            f"`model.id={model.id}` (revision {model.revision}) is neither a folder nor a hub id "
            f"that can be reached; give a folder or ORG/NAME ({type(error).__name__})"
        ) from error
    return Path(folder)
