"""Scales that a quantizer moved between layers before it rounded them, found again.

AWQ and SmoothQuant multiply columns of a layer by what they take out of the norm before it, or out
of the rows of the layer before: the model computes the same, and its weights are others. Where they
went is known: a norm is stored, and tells the scales exactly, factor and all; a layer that lost
them from its rows loses what the next one's columns have more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

# Size of the differences of scales as a share of theirs, by width: rounding errors of a column's
# weights are averaged over its rows. Seen of normal weights in groups of 128, with scales spread by
# a factor of 1.5 to 2.2: 0.001, 0.05, 0.15, 0.37.
_SAME = {8: 0.02, 4: 0.08, 3: 0.2, 2: 0.4}
_BETTER = 0.8  # a norm's change must make the columns' scales fit so much better than none


def columns(found: Array, base: Array) -> Array:
    """The best factor of every column, by least squares; one where all weights are zero."""
    return _scales(base, found, 0)


def rows(found: Array, base: Array) -> Array:
    """The same of every row."""
    return _scales(base, found, 1)


def _scales(base: Array, found: Array, axis: int) -> Array:
    import numpy as np

    size = (base**2).sum(axis)
    product = (base * found).sum(axis)
    scales: Array = np.divide(product, size, out=np.ones_like(size), where=size > 0)
    return scales


def moved(
    base: Array, norms: Iterable[Array], after: Mapping[str, Array]
) -> Iterator[tuple[Array, str | None]]:
    """A layer as scales may have made it, and the layer whose columns got those of its rows.

    `norms` are the base's norms over those that were found, `after` the columns' scales of other
    layers of the block.
    """
    high, wide = base.shape
    scaled = [base * taken for taken in norms if len(taken) == wide]
    yield from ((each, None) for each in scaled)
    for each in (base, *scaled):
        for layer, more in after.items():
            if len(more) == high:
                yield each / _nonzero(more)[:, None], layer


def _nonzero(scales: Array) -> Array:
    import numpy as np

    found: Array = np.where(scales == 0, 1, scales)
    return found


def explains(scales: Array, norm: Array, bits: int) -> bool:
    """Whether a norm is the base's less what the columns of a layer have more."""
    return len(scales) == len(norm) and _is_better(scales, norm, bits)


def explains_bias(scales: Array, found: Array, base: Array, bits: int) -> bool:
    """Whether a layer's bias was scaled as its rows were, which columns' scales may enlarge."""
    return _is_better(_even(scales), _even(ratio(found, base)), bits)


def ratio(above: Array, below: Array) -> Array:
    """The quotient of two vectors; one where the lower is zero."""
    import numpy as np

    found: Array = np.divide(above, below, out=np.ones_like(below), where=below != 0)
    return found


def lost(base: Array, found: Array) -> tuple[Array, Array]:
    """What a norm lost: one that multiplies by its weight, and one by 1 + weight, as Gemma's."""
    return ratio(base, found), ratio(1 + base, 1 + found)


def _even(scales: Array) -> Array:
    """Scales with a median of one."""
    import numpy as np

    middle = float(np.median(scales))
    return scales if middle == 0 else scales / middle


def _is_better(scales: Array, wanted: Array, bits: int) -> bool:
    import numpy as np

    same = next((limit for width, limit in _SAME.items() if bits >= width), _SAME[2])
    apart = float(np.linalg.norm(scales - wanted))
    near = apart <= same * float(np.linalg.norm(wanted))
    return near and apart < _BETTER * float(np.linalg.norm(scales - 1))
