"""AQLM: every run of weights is a sum of entries, one of each codebook, times a scale of its rows.

`codes` `(rows / high, columns / wide, codebooks)` name the entries, kept as signed numbers;
`codebooks` `(codebooks, entries, high, wide)` hold them; `scales` `(rows / high, 1, 1, 1)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.published import Claims, Config, Description, Layer, Unreadable, scale_bits, settings

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

KINDS = ("aqlm",)
PACKAGES = ("aqlm", "torch", "transformers", "accelerate")
_KEPT = "linear_weights_not_to_quantize"


def described(config: Config) -> Description:
    """See `qgrid.published`. The width is that of the codes alone: `2x8` of eight weights is 2.

    Raises:
        Unreadable: codes of more than 16 bits, or fewer than one bit a weight.
    """
    told = settings(config)
    told.texts(_KEPT)
    books, each, weights = _sizes(told)
    if each > 16 or books * each < weights:
        raise Unreadable(f"has {books} codebooks of {each} bits for {weights} weights each")
    return Description("aqlm", round(books * each / weights), PACKAGES)


def _sizes(told: Claims) -> tuple[int, int, int]:
    """Codebooks, bits of a code, weights that it stands for."""
    weights = told.count("in_group_size") * told.count("out_group_size")
    return told.count("num_codebooks"), told.count("nbits_per_codebook"), weights


def stored_bits(config: Config, rows: int, columns: int) -> tuple[float, float]:
    """Codes in whole bytes, a layer's own codebooks and scales."""
    told = settings(config)
    books, each, weights = _sizes(told)
    codes = rows * columns // weights * books * (8 if each <= 8 else 16)
    floats = books * 2**each * weights + rows // told.count("out_group_size")
    exact = (codes + floats * scale_bits(config)) / (rows * columns)
    return exact, exact


def weights(config: Config, layer: Layer) -> Array:
    """See `qgrid.published`."""
    import numpy as np

    codes, books = layer.parts["codes"], layer.parts["codebooks"].astype(np.float32)
    chosen = codes.astype(np.int64) % books.shape[1]
    runs = sum(books[number][chosen[:, :, number]] for number in range(len(books)))
    scaled = np.asarray(runs) * layer.parts["scales"].astype(np.float32)
    found: Array = scaled.transpose(0, 2, 1, 3).reshape(layer.rows, layer.columns)
    return found


def load(folder: Path, arguments: Mapping[str, Any]) -> Any:
    """The model, with names of modules among those that are not quantized.

    Checkpoints name weights (`lm_head.weight`); transformers 5.17 compares the names with modules,
    so that it would quantize the head, find no codes for it and make them up.
    """
    from transformers import AutoConfig

    from qgrid.libraries import loading

    config = AutoConfig.from_pretrained(folder)
    told = config.quantization_config
    kept = told.get(_KEPT) or []
    config.quantization_config = told | {_KEPT: [name.removesuffix(".weight") for name in kept]}
    model = loading.pretrained(folder, {**arguments, "config": config})
    _unpack_on_cpu(model)
    return model


def _unpack_on_cpu(model: Any) -> None:
    """Give layers on a CPU the library's product of unpacked weights.

    Its own choice there, tables of products, adds to one vector from all threads at once without a
    lock: with two threads aqlm 1.1.7 computes other logits in every pass.
    """
    from aqlm import QuantizedLinear
    from aqlm.inference_kernels.dequantization import dequantize_gemm

    class Unpacked:
        apply = staticmethod(dequantize_gemm)

    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.codebooks.device.type == "cpu":
            module.gemv_op = module.gemm_op = Unpacked
            module.use_gemv_rule = lambda _: False
