"""What is known of the quantized KV caches that an engine has used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qgrid.contracts import InvalidEngine
from qgrid.runtimes import _kv_cache

if TYPE_CHECKING:
    from qgrid.runtimes._kv_cache import Held, Quantization
    from qgrid.types import Check


class Used:
    """Weighs the first cache of each use, and counts distributions.

    It is told of a cache from which quantized tokens were read.
    """

    def __init__(self, asked: Quantization) -> None:
        self._asked = asked
        self._held: dict[str, list[Held]] = {}
        self._rows = self._after_quantized = 0

    def note(self, use: str, held: list[Held]) -> None:
        """Remember what a cache holds, whatever it is."""
        self._held[use] = held

    def require(self, use: str, cache: Any) -> None:
        """Weigh a cache, if it is the first of its use.

        Raises:
            InvalidEngine: it does not hold what was asked for.
        """
        if use in self._held:
            return
        self.note(use, _kv_cache.held(cache))
        found = _kv_cache.check(self._held[use], self._asked, [use])
        if not found.ok:
            raise InvalidEngine(
                f"check `kv_cache`: expected {found.expected}, found {found.actual}"
            )

    def generated(self, cache: Any, lengths: Sequence[int]) -> None:
        """A batch of new tokens: a request's first comes from its prompt, as it was read.

        Raises:
            InvalidEngine: as `require`.
        """
        self.require("generation", cache)
        self.add(sum(length > 0 for length in lengths), before=False)
        self.add(sum(max(length - 1, 0) for length in lengths), before=True)

    def check(self) -> Check:
        """The verdict on every cache that was weighed."""
        every = [held for found in self._held.values() for held in found]
        return _kv_cache.check(every, self._asked, list(self._held))

    def add(self, rows: int, before: bool) -> None:
        """Count distributions; `before`: quantized tokens stand before each of them."""
        self._rows += rows
        self._after_quantized += rows * before

    @property
    def rows(self) -> tuple[int, int]:
        """All distributions, and those with quantized tokens before them."""
        return self._rows, self._after_quantized
