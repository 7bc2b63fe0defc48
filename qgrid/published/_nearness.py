"""Whether decoded weights are as near to a base's as their width allows, as a whole and by row.

What the width allows is computed from the base itself: every row rounded to nearest under one
scale, which is the coarsest that any format here does. Formats with more scales stay below that
(0.6 to 1 times it on a trained model), GPTQ, which moves weights so that their errors cancel, above
it (1.1 to 1.7 times).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qgrid import phrases

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_FARTHEST = 2.0  # times the error of rounding rows to nearest
_FARTHEST_ROW = 3.0  # the same for single rows, of which the worst was 2.2
_FLOAT8 = 2**-4 / 3**0.5  # 3 bits of mantissa, just above a power of two, whatever the scale
_ALIKE = 0.5  # least cosine; of unrelated weights it is 0, of 2 bits by GPTQ it was 0.64
_ALIKE_ROW = 0.3
_FEW = 0.1  # of the rows: then it is they that are named
_SMALL = 0.05  # of the usual size: rows that a scale shared with larger ones may round away
_SIZE = 0.02  # how much larger or smaller weights are at most, beside the error's square: of
# centroids the mean is kept, of rounding it is not


@dataclass(frozen=True)
class Nearness:
    """`error` is relative to the base's size; `wrong` says why it is not what the width leaves."""

    error: float
    wrong: str | None


def nearness(found: Array, base: Array, bits: int, floats: bool) -> Nearness:
    """Compare decoded weights with the base's; `floats`: kept as floats of 8 bits."""
    import numpy as np

    least = _FLOAT8 if floats else 0.0
    sizes, errors = _rows(base), _rows(found - base)
    rounding = _rows(_rounded(base, bits) - base)
    whole = float(np.linalg.norm(sizes))
    error = _share(float(np.linalg.norm(errors)), whole)
    allowed = max(least, _share(float(np.linalg.norm(rounding)), whole))
    products = (found * base).sum(1)
    size = _share(float(products.sum()), whole**2)
    alike = _share(float(products.sum()), whole * float(np.linalg.norm(found)))
    usual = np.maximum(sizes, _SMALL * whole / len(sizes) ** 0.5)
    limits = _FARTHEST_ROW * np.maximum(allowed * usual, rounding)
    cosines = products / np.maximum(sizes * _rows(found), np.finfo(np.float32).tiny)
    other = ~(errors <= limits) | ((cosines < _ALIKE_ROW) & (sizes == usual) & (sizes > 0))
    told = f"has other rows ({phrases.first([str(row) for row in np.flatnonzero(other)], ', ')})"
    if 0 < other.mean() < _FEW:
        return Nearness(error, told)
    if not error <= _FARTHEST * allowed or (whole and alike < _ALIKE):  # NaN is far as well
        return Nearness(error, f"is {error:.2g} of its size apart")
    if whole and abs(size - 1) > _SIZE + allowed**2:
        return Nearness(error, f"is {size:.3g} times as large")
    return Nearness(error, told if other.any() else None)


def _rounded(base: Array, bits: int) -> Array:
    """Every row rounded to nearest under one scale."""
    import numpy as np

    step = 2 * np.abs(base).max(1, keepdims=True, initial=0) / (2**bits - 1)
    step[step == 0] = 1
    found: Array = np.clip(np.round(base / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    return found


def _rows(values: Array) -> Array:
    import numpy as np

    found: Array = np.linalg.norm(values, axis=1)
    return found


def _share(part: float, whole: float) -> float:
    return part / whole if whole else part
