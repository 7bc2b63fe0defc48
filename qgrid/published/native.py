"""The formats that GPTQ and AWQ brought with them.

`gptq`: a column of `qweight` is one stream of codes, a row of `qzeros` one of zero points, kept
less one in the old form; `g_idx` is the group of each column, which may be left out. `awq`: eight
4-bit codes in a word, in an order of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qgrid.layouts import native
from qgrid.published import (
    SETTINGS,
    Claims,
    Config,
    Description,
    Layer,
    Unreadable,
    _codes,
    settings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from qgrid.types import Tensor

    Array = np.ndarray[Any, Any]

KINDS = ("gptq", "awq")
# pypcre is compiled where it is installed, and without a compiler it is missing. optimum loads.
PACKAGES = ("gptqmodel", "pypcre", "optimum", "torch", "transformers")
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
_FORMS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_OLD = "gptq"  # zero points are kept less one
_UNQUANTIZED = 16
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of eight neighbours lie in a word


def described(config: Config) -> Description:
    """See `qgrid.published`.

    Raises:
        Unreadable: a width or a packing that is not read here.
    """
    told = settings(config)
    kind, bits = str(told.text("quant_method")), told.count("bits")
    if bits not in _BITS[kind]:
        has = ", ".join(map(str, _BITS[kind]))
        raise Unreadable(f"is `{kind}` with {bits} bits (known: {has})")
    if told.flag("lm_head"):
        raise Unreadable("has a quantized output head, which is not compared here")
    form = _form(config)
    if form not in _FORMS[kind]:
        raise Unreadable(f"packs `{kind}` as `{form}` (known: {', '.join(_FORMS[kind])})")
    told.count("group_size", -1)
    told.flag("desc_act")
    told.text("pack_dtype", "int32")
    told.refuse("is_marlin_format", "rotation")
    for each in ("dynamic", "extra_config"):
        _require_alike(told.part(each), each)
    return Description(kind, bits, PACKAGES)


def _form(config: Config) -> str:
    """How codes are packed; the libraries' own first form where nothing is said."""
    told = settings(config)
    kind = str(told.text("quant_method"))
    keys = ("version",) if kind == "awq" else ()
    found = [told.text(key) for key in (*keys, "checkpoint_format", "format")]
    return next((each.lower() for each in found if each), _FORMS[kind][0])


def _require_alike(told: Claims, key: str) -> None:
    """Single layers are left out at most: `-:PATTERN`, or 16 bits. No layer has its own width."""
    for layer, own in told.parts():
        if not layer.startswith("-:") and own.count("bits") < _UNQUANTIZED:
            raise Unreadable(f"has layers of different widths by `{key}`, which are not read here")


def stored_bits(config: Config, rows: int, columns: int) -> tuple[float, float]:
    """Codes, zero points, 16-bit scales; of `gptq` the columns' groups, which may be left out."""
    told = config[SETTINGS]
    bits, groups = told["bits"], -(-columns // _group_size(config, columns))
    codes = rows * columns * bits + groups * rows * (bits + 16)
    places = 32 * columns if told["quant_method"] == "gptq" else 0
    return codes / (rows * columns), (codes + places) / (rows * columns)


def _group_size(config: Config, columns: int) -> int:
    """Weights of a row under one scale."""
    size: int = config[SETTINGS]["group_size"]
    return columns if size == -1 else size


def weights(config: Config, layer: Layer) -> Array:
    """See `qgrid.published`."""
    import numpy as np

    awq = config[SETTINGS]["quant_method"] == "awq"
    codes, zeros = _awq(layer) if awq else _gptq(config, layer)
    group = layer.parts.get("g_idx")
    scales = layer.parts["scales"].T  # rows, groups
    if group is None:  # as the columns lie
        group = np.arange(layer.columns) // _group_size(config, layer.columns)
    weights: Array = (codes - zeros[:, group]).astype("f4") * scales[:, group]
    return weights


def added(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """The groups of columns that lie in order, which some checkpoints leave out.

    transformers 5.17 takes what the memory holds for them.

    Raises:
        Unreadable: the columns are in another order, which nothing tells.
    """
    import numpy as np

    lacking: dict[str, Array] = {}
    for name in tensors:
        layer, packed, _ = name.partition(".qweight")
        parts = {part: tensors.get(f"{layer}.{part}") for part in ("qweight", "scales", "qzeros")}
        if not packed or f"{layer}.g_idx" in tensors or None in parts.values():
            continue
        held = {part: tensor for part, tensor in parts.items() if tensor is not None}
        if native.format_of(held) != "gptq":
            continue
        _, columns = native.shape(held, lambda _: b"") or (0, 0)
        size = _group_size(config, columns)
        if config[SETTINGS].get("desc_act") and size < columns:
            raise Unreadable(f"orders columns by `desc_act` and has no `{layer}.g_idx`")
        lacking[f"{layer}.g_idx"] = (np.arange(columns) // size).astype(np.int32)
    return lacking


def _gptq(config: Config, layer: Layer) -> tuple[Array, Array]:
    """Codes `(rows, columns)` and zero points `(rows, groups)`."""
    bits = config[SETTINGS]["bits"]
    less = 1 if _form(config) == _OLD else 0
    codes = _codes.stream(layer.parts["qweight"].T, bits, layer.columns)
    zeros = _codes.stream(layer.parts["qzeros"], bits, layer.rows).T + less
    return codes, zeros


def _awq(layer: Layer) -> tuple[Array, Array]:
    return _places(layer.parts["qweight"]).T, _places(layer.parts["qzeros"]).T


def _places(words: Array) -> Array:
    """The codes of each row of words, in the order of the weights."""
    plain = _codes.stream(words, 4, 8 * words.shape[1]).reshape(len(words), -1, 8)
    found: Array = plain[:, :, _AWQ_PLACES].reshape(len(words), -1)
    return found
