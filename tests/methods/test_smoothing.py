"""Scales that may have been moved between layers are told from weights that are simply wrong."""

from __future__ import annotations

import numpy as np
import pytest

from qgrid.published import _smoothing

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(64, 128)).astype(np.float32)
ROUNDED = BASE + 0.05 * RNG.normal(size=BASE.shape).astype(np.float32)


def accounted(found: np.ndarray, norms: list[np.ndarray] | None = None) -> bool:  # type: ignore[type-arg]
    others = [_smoothing.fit(ROUNDED, BASE)]
    return _smoothing.accounted(_smoothing.fit(found, BASE), norms or [], others)


@pytest.mark.parametrize("factor", [0.25, 4.0, -1.0])
def test_a_constant_factor_is_nobodys_scale(factor: float) -> None:
    """MXFP4 weights were four times too small in a version of a library."""
    assert accounted(ROUNDED)
    assert not accounted(np.float32(factor) * ROUNDED)


def test_scales_that_a_norm_lost_are_accounted_for() -> None:
    scales = np.exp(RNG.normal(size=BASE.shape[1])).astype(np.float32)
    assert accounted(ROUNDED * scales, [scales])
    assert not accounted(ROUNDED * scales, [np.ones_like(scales)])
