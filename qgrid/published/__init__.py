"""Quantized checkpoints that others made: what their config says, their weights decoded by hand.

One file for each family of them; no library that writes such checkpoints is asked. A file offers

* `KINDS`: what `quantization_config.quant_method` calls the family;
* `described(config) -> Description`, from the whole `config.json`;
* `stored_bits(config, rows, columns) -> (lowest, highest)` bits per weight of a layer;
* `weights(config, layer) -> array`, the weights `(rows, columns)` of a layer in fp32;
* `checks(folder) -> Sequence[Check]`, where it has some: cheap verdicts about stored tensors;
* `load(folder, arguments) -> model`, where transformers needs help; else it loads them itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Config = Mapping[str, Any]
SETTINGS = "quantization_config"


class Unreadable(ValueError):
    """A checkpoint that cannot be read here; the message continues "the checkpoint ..."."""


@dataclass(frozen=True)
class Description:
    """What a config says: the artifact format, the width, the distributions that load it."""

    format: str
    bits: int
    packages: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """The tensors of one linear layer by their names within it; floats as fp32."""

    parts: Mapping[str, np.ndarray[Any, Any]]
    rows: int
    columns: int


def family(config: Config) -> Any:
    """The module for a checkpoint with this `config.json`.

    Raises:
        Unreadable: it is not quantized, or in a way that is not known here.
    """
    settings = config.get(SETTINGS)
    if not settings:
        raise Unreadable(f"has no `{SETTINGS}` in its `config.json`, so it is not quantized")
    kind = settings.get("quant_method")
    known = families()
    if kind not in known:
        raise Unreadable(f"is quantized by `{kind}` (known: {', '.join(sorted(known))})")
    return known[kind]


@cache
def families() -> dict[str, Any]:
    """The module of each kind of checkpoint, by its name in a config."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [
        importlib.import_module(f"{__name__}.{name}") for name in names if not name.startswith("_")
    ]
    return {kind: module for module in modules for kind in module.KINDS}


def scale_bits(config: Config) -> int:
    """Width of a stored scale: that of the floats which the checkpoint computes in."""
    told = config.get("dtype", config.get("torch_dtype"))
    return 32 if told == "float32" else 16
