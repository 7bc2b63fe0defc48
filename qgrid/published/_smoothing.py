"""Scales that a quantizer moved between layers before it rounded them, found again.

AWQ and SmoothQuant multiply columns of a layer by what they take out of the norm before it, or out
of the rows of the layer before: the model computes the same, and its weights are others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_ROUNDS = 3  # of rows and columns in turn; the first is nearly exact
_SAME = 0.2  # root mean square of relative differences of scales; two bits leave a tenth
_BETTER = 0.8  # a norm's change must make the columns' scales fit so much better than none


@dataclass(frozen=True)
class Fit:
    """Scales of rows and columns under which a layer is nearest to the base's, and how near.

    `error` is relative to the layer's size; that of unrelated weights is about one. `plain` are
    the columns' scales where the rows have none.
    """

    error: float
    rows: Array
    columns: Array
    plain: Array


def fit(found: Array, base: Array) -> Fit:
    """The best `rows[i] * base[i, j] * columns[j]` for the weights `found`, by least squares."""
    import numpy as np

    rows = np.ones(len(base), np.float32)
    plain = columns = _scales(base, found, 0)
    for _ in range(_ROUNDS):
        rows = _scales(base * columns, found, 1)
        columns = _scales(base * rows[:, None], found, 0)
    return Fit(apart(base * columns * rows[:, None], found), rows, columns, plain)


def apart(found: Array, base: Array) -> float:
    """The size of the difference, relative to that of `base`; of nothing but zeros as it is."""
    import numpy as np

    size = float(np.linalg.norm(base))
    difference = float(np.linalg.norm(found - base))
    return difference / size if size else difference


def _scales(base: Array, found: Array, axis: int) -> Array:
    """The best factor of every column (axis 0) or row (axis 1); one where all weights are zero."""
    import numpy as np

    size = (base**2).sum(axis)
    product = (base * found).sum(axis)
    ones: Array = np.divide(product, size, out=np.ones_like(size), where=size > 0)
    return ones


def accounted(fit: Fit, norms: Iterable[Array], others: Iterable[Fit]) -> bool:
    """Whether a layer's scales are what was taken out of the norms or the other layers of a block.

    `norms` are the base's norms over those that were found. A factor common to all rows is known
    only where the rows have no scales of their own.
    """
    others = list(others)
    rows = _even(fit.rows)
    if _near(rows, 1):
        if any(_near(fit.plain, norm) for norm in norms):
            return True
        even = _even(fit.plain)
        if _near(even, 1):  # all columns alike: nothing was moved, they are too large or too small
            return _near(fit.plain, 1)
        return _inverse(even, (each.rows for each in others))
    if not _inverse(rows, (each.columns for each in others)):
        return False
    columns = _even(fit.columns)
    before = any(_near(columns, _even(norm)) for norm in norms)
    return before or _near(columns, 1) or _inverse(columns, (each.rows for each in others))


def explains(fit: Fit, norm: Array) -> bool:
    """Whether a norm is the base's less what the columns of this layer have more."""
    if len(fit.plain) != len(norm):
        return False
    return _near(fit.plain, norm) and _apart(fit.plain, norm) < _BETTER * _apart(fit.plain, 1)


def explains_bias(fit: Fit, found: Array, base: Array) -> bool:
    """Whether a layer's bias was scaled as its rows were."""
    return _near(_even(fit.rows), _even(ratio(found, base)))


def ratio(above: Array, below: Array) -> Array:
    """The quotient of two vectors; one where the lower is zero."""
    import numpy as np

    found: Array = np.divide(above, below, out=np.ones_like(below), where=below != 0)
    return found


def _even(scales: Array) -> Array:
    """Scales with a median of one."""
    import numpy as np

    middle = float(np.median(scales))
    return scales if middle == 0 else scales / middle


def _inverse(scales: Array, others: Iterable[Array]) -> bool:
    return any(_near(scales * _even(each), 1) for each in others if len(each) == len(scales))


def _near(scales: Array, wanted: Array | int) -> bool:
    return not _differ(scales, wanted) and _apart(scales, wanted) <= _SAME


def _differ(scales: Array, wanted: Array | int) -> bool:
    return not isinstance(wanted, int) and len(wanted) != len(scales)


def _apart(scales: Array, wanted: Array | int) -> float:
    """Root mean square of the relative differences."""
    import numpy as np

    wanted = np.full_like(scales, wanted) if isinstance(wanted, int) else wanted
    return float(np.sqrt(np.mean((ratio(scales, wanted) - 1) ** 2)))
