"""Whether an adapter fits its model, from its configuration and tensor headers alone; no torch.

Only what changes linear layers by a product of two low-rank matrices is taken. Everything else that
PEFT can put into an adapter is refused by name: whole trained layers, biases and embeddings, and
initializations that altered the base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import codec, models, phrases, registry
from qgrid.files import sha256
from qgrid.lora import adapters
from qgrid.weights import fingerprint, headers, inspection

if TYPE_CHECKING:
    from qgrid.types import Model, Tensor

_TENSOR = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?"
)
_KINDS = ("CAUSAL_LM", None)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # they leave the base as it was
_READ = frozenset({"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora"}) | {
    "rank_pattern", "alpha_pattern", "target_modules", "init_lora_weights",
    "base_model_name_or_path",
}  # fmt: skip
_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
})  # fmt: skip
_UNSET: tuple[Any, ...] = (None, False, {}, [], "none")


@dataclass(frozen=True)
class Fit:
    """What an adapter's files hold: its configuration, and the tensors of each layer by part."""

    config: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


class Unfit(ValueError):
    """An adapter that cannot be applied; the message is the second half of a sentence."""


def refusal(model: Model) -> str | None:
    """Why a model cannot have its adapter; None if it can, or is not on this machine.

    Raises:
        ModelNotFound: a folder that holds no adapter, or no checkpoint.
    """
    base = models.located(model)
    if base is not None and (base / adapters.CONFIG).is_file():
        return (
            f"`model.id={model.id}` holds an `{adapters.CONFIG}` beside its weights, which would "
            "be applied unasked; give a folder of the base alone, and `model.adapter`"
        )
    if model.adapter is None:
        return None
    known = [adapters.PLAIN_BASE, *registry.names("methods")]
    if model.adapter_base not in (None, *known):
        return (
            f"`model.adapter_base={model.adapter_base}` should be what the adapter was trained on: "
            f"{', '.join(known)}, or null"
        )
    folder = adapters.located(model)
    try:
        if folder is not None:
            found = read(folder)
            if base is not None:
                _require_fit(found, folder, model, base)
    except Unfit as error:
        return f"`model.adapter={model.adapter}` {error}"
    return None


def read(folder: Path) -> Fit:
    """The configuration and the tensors of an adapter.

    Raises:
        Unfit: it is not a plain LoRA in safetensors.
    """
    config = _config(folder)
    if not (folder / adapters.WEIGHTS).is_file():
        pickled = " (only a pickle, which is not read)" if any(folder.glob("*.bin")) else ""
        raise Unfit(
            f"has no `{adapters.WEIGHTS}`{pickled}; save it with PEFT's `save_pretrained`, which "
            "writes safetensors"
        )
    try:
        tensors = headers.read_header(folder / adapters.WEIGHTS)
    except headers.TornFile as error:
        raise Unfit(f"is no whole adapter: {error}") from None
    layers: dict[str, dict[str, Tensor]] = {}
    for name, (tensor, _) in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise Unfit(
                f"holds the tensor `{name}`, which is not of a low-rank pair; merge it with PEFT "
                "and give the result as `model.id`"
            )
        layers.setdefault(match["layer"], {})[match["part"]] = tensor
    _require_pairs(config, layers)
    return Fit(config, layers)


def _config(folder: Path) -> Mapping[str, Any]:
    """The configuration, where it is one of a plain LoRA."""
    try:
        config = json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        raise Unfit(f"has a `{adapters.CONFIG}` that is not JSON; save the adapter again") from None
    advice = "merge it with PEFT and give the result as `model.id`"
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise Unfit(f"has `peft_type={kind}`; only LORA is applied: {advice}")
    if config.get("task_type") not in _KINDS:
        raise Unfit(f"has `task_type={config['task_type']}`; only CAUSAL_LM is applied")
    _require_numbers(config)
    start = config.get("init_lora_weights", True)
    if not any(
        start is each or (isinstance(start, str) and start == each) for each in _PLAIN_STARTS
    ):
        raise Unfit(f"has `init_lora_weights={start}`, which alters the base's weights; {advice}")
    for key in sorted(config.keys() - _READ - _WITHOUT_EFFECT):
        if config[key] not in _UNSET:
            raise Unfit(f"has `{key}={codec.plain(config[key])}`, which is not applied; {advice}")
    return config


def _require_numbers(config: Mapping[str, Any]) -> None:
    """Ranks are counts, scales are numbers, and patterns are patterns."""
    ranks, scales = (config.get(f"{key}_pattern") or {} for key in ("rank", "alpha"))
    counts = {"r": config.get("r"), **ranks}
    numbers = {"lora_alpha": config.get("lora_alpha"), **scales}
    for named, kinds in ((counts, (int,)), (numbers, (int, float))):
        for key, value in named.items():
            if type(value) not in kinds or value <= 0:
                raise Unfit(f"has `{key}={codec.plain(value)}`, which should be a number above 0")
    for pattern in (*ranks, *scales):
        try:
            re.compile(pattern)
        except re.error as error:
            raise Unfit(f"has the pattern `{pattern}`, which is none ({error})") from None


def _require_pairs(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Both matrices of every layer are there and have the rank that the configuration says."""
    if not layers:
        raise Unfit("holds no tensor; save it again")
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    for layer, parts in layers.items():
        if parts.keys() != wanted:
            raise Unfit(f"has {', '.join(sorted(parts))} of `{layer}` alone; save it again")
        rank = _rank(config, layer)
        found = parts["lora_A"].shape[0], parts["lora_B"].shape[1]
        if found != (rank, rank):
            raise Unfit(
                f"has matrices of rank {found[0]} and {found[1]} for `{layer}`, its configuration "
                f"says {rank}; give the folder that both came from"
            )


def scaling(config: Mapping[str, Any], layer: str) -> float:
    """What the product of a layer's two matrices is multiplied by."""
    alpha = float(_of_layer(config, "alpha_pattern", "lora_alpha", layer))
    rank = _rank(config, layer)
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _rank(config: Mapping[str, Any], layer: str) -> int:
    return int(_of_layer(config, "rank_pattern", "r", layer))


def _of_layer(config: Mapping[str, Any], patterns: str, key: str, layer: str) -> Any:
    """A layer's own number: `key`, or what the first fitting pattern says (PEFT's rule)."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return config[key]


def _require_fit(found: Fit, folder: Path, model: Model, base: Path) -> None:
    """The adapter's layers, base and tokenizer are the model's."""
    _require_shapes(found, base)
    _require_base(found, model, base)
    if any((folder / name).is_file() for name in models.TOKENIZER_FILES):
        theirs, ours = fingerprint.fingerprint(folder), fingerprint.fingerprint(base)
        if wrong := fingerprint.difference(ours, theirs):
            raise Unfit(
                f"comes with another tokenizer than the model's ({phrases.first(wrong, ', ')}); "
                "give the base it was trained with, or take the tokenizer out of its folder"
            )


def _require_shapes(found: Fit, base: Path) -> None:
    tensors = inspection.read_headers(base)
    config = models.read_config(base)
    for layer, parts in found.layers.items():
        weight = tensors.get(f"{layer}.weight")
        if weight is None or len(weight.shape) != 2:
            raise Unfit(f"is for a layer `{layer}`, which the model does not have; give its base")
        if layer == "lm_head" and models.tied(config):
            raise Unfit("changes `lm_head`, whose weights this model shares with its embedding")
        shape = parts["lora_B"].shape[0], parts["lora_A"].shape[1]
        if shape != weight.shape:
            raise Unfit(
                f"is for a `{layer}` of {shape[0]} x {shape[1]}, the model's is "
                f"{weight.shape[0]} x {weight.shape[1]}; give the base that it was trained on"
            )
    if absent := sorted(_targets(found.config, tensors) - found.layers.keys()):
        raise Unfit(
            f"names `{absent[0]}` among its targets and has no tensors for it (nor for "
            f"{len(absent) - 1} more); give the base that it was trained on"
        )


def _targets(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> set[str]:
    """Linear layers of the decoder that a list of targets names; none where more rules apply."""
    names = config.get("target_modules")
    narrowed = any(config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    if not isinstance(names, list) or narrowed:
        return set()
    layers = inspection.decoder_linears(tensors)
    return {layer for layer in layers if any(f".{layer}".endswith(f".{name}") for name in names)}


def _require_base(found: Fit, model: Model, base: Path) -> None:
    """The base that the configuration names is the model, where both can be told apart.

    Somebody who says what it was trained on (`adapter_base`) knows that the names differ.
    """
    named = found.config.get("base_model_name_or_path")
    if not named or model.adapter_base is not None:
        return
    for wrong in _another_base(str(named), model, base):
        raise Unfit(
            f"was trained on `{named}`, {wrong}; give that as `model.id`, or say what it was "
            f"trained on with `model.adapter_base` ({adapters.PLAIN_BASE}, or a method)"
        )


def _another_base(named: str, model: Model, base: Path) -> Iterator[str]:
    place = Path(named).expanduser()
    if place.is_dir():
        if place.resolve() != base.resolve() and _weights(place) != _weights(base):
            yield f"which holds other files than `model.id={model.id}`"
        return
    on_hub = not (models.is_path(named) or models.is_path(model.id) or Path(model.id).is_dir())
    if on_hub and named.lower() != model.id.lower():
        yield f"not on `model.id={model.id}`"


def _weights(folder: Path) -> dict[str, str]:
    """Hashes of the weights' files: a model and its fine-tune differ in nothing else."""
    return {path.name: sha256(path) for path in headers.weight_files(folder)}
