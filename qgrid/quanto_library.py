"""optimum-quanto, imported so that it compiles nothing.

On a CPU it would compile a few lines of C++ to unpack codes of 2 and 4 bits when it first meets
some: that needs a compiler and ninja, and writes into the library's own folder, where two
processes meet. The same calls of torch are put in their place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class _Unpacking:
    """What the compiled extension offers."""

    @staticmethod
    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        """Codes of `bits` bits, `(8 // bits * rows, ...)`: the lowest of all bytes come first."""
        import torch

        mask = 2**bits - 1
        return torch.cat([(packed >> place) & mask for place in range(0, 8, bits)])


def library() -> Any:
    """The package `optimum.quanto`."""
    from optimum import quanto
    from optimum.quanto.library.extensions import get_extension

    get_extension("quanto_cpp")._lib = _Unpacking
    return quanto
