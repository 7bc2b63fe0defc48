"""The formats that GPTQ and AWQ brought with them.

`gptq`: a column of `qweight` is one stream of codes, a row of `qzeros` one of zero points, kept
less one in the old form; `g_idx` is the group of each column. `awq`: eight 4-bit codes in a word,
in an order of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qgrid.published import SETTINGS, Config, Description, Layer, Unreadable, _codes

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

KINDS = ("gptq", "awq")
# pypcre is compiled where it is installed, and without a compiler it is missing. optimum loads.
_PACKAGES = ("gptqmodel", "pypcre", "optimum", "torch", "transformers")
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
_OLD = ("gptq", None)  # `checkpoint_format`: zero points are kept less one
_AWQ_FORMS = ("gemm", None)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of eight neighbours lie in a word


def described(config: Config) -> Description:
    """See `qgrid.published`.

    Raises:
        Unreadable: a width or a packing that is not read here.
    """
    settings = config[SETTINGS]
    kind, bits = settings["quant_method"], settings.get("bits")
    if bits not in _BITS[kind]:
        has = ", ".join(map(str, _BITS[kind]))
        raise Unreadable(f"is `{kind}` with {bits} bits (known: {has})")
    if settings.get("lm_head"):
        raise Unreadable("has a quantized output head, which is not compared here")
    form = settings.get("version", settings.get("checkpoint_format"))
    if kind == "awq" and form not in _AWQ_FORMS:
        raise Unreadable(f"packs `awq` as `{form}` (known: gemm)")
    return Description(kind, bits, _PACKAGES)


def stored_bits(config: Config, rows: int, columns: int) -> tuple[float, float]:
    """Codes, zero points, 16-bit scales; of `gptq` the columns' groups, which may be left out."""
    settings = config[SETTINGS]
    bits, size = settings["bits"], settings.get("group_size", -1)
    groups = 1 if size in (None, -1) else -(-columns // size)
    codes = rows * columns * bits + groups * rows * (bits + 16)
    places = 32 * columns if settings["quant_method"] == "gptq" else 0
    return codes / (rows * columns), (codes + places) / (rows * columns)


def weights(config: Config, layer: Layer) -> Array:
    """See `qgrid.published`."""
    settings = config[SETTINGS]
    codes, zeros = (_awq if settings["quant_method"] == "awq" else _gptq)(settings, layer)
    group = layer.parts.get("g_idx")
    scales = layer.parts["scales"].T  # rows, groups
    if group is None:
        import numpy as np

        group = np.arange(layer.columns) // -(-layer.columns // scales.shape[1])
    weights: Array = (codes - zeros[:, group]).astype("f4") * scales[:, group]
    return weights


def _gptq(settings: Config, layer: Layer) -> tuple[Array, Array]:
    """Codes `(rows, columns)` and zero points `(rows, groups)`."""
    bits = settings["bits"]
    less = 1 if settings.get("checkpoint_format") in _OLD else 0
    codes = _codes.stream(layer.parts["qweight"].T, bits, layer.columns)
    zeros = _codes.stream(layer.parts["qzeros"], bits, layer.rows).T + less
    return codes, zeros


def _awq(settings: Config, layer: Layer) -> tuple[Array, Array]:
    return _places(layer.parts["qweight"]).T, _places(layer.parts["qzeros"]).T


def _places(words: Array) -> Array:
    """The codes of each row of words, in the order of the weights."""
    plain = _codes.stream(words, 4, 8 * words.shape[1]).reshape(len(words), -1, 8)
    found: Array = plain[:, :, _AWQ_PLACES].reshape(len(words), -1)
    return found
