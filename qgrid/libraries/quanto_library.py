"""optimum-quanto, imported so that it compiles nothing.

It would compile a few lines of C++, or of CUDA, to unpack codes of 2 and 4 bits when it first meets
some, and on a GPU kernels for int4 in fp16 (AWQ's) and for E4M3 (Marlin's): that needs a compiler
and ninja, and writes into the library's own folder, where two processes meet. Torch unpacks in
their place, on every device; those kernels are not chosen, so that torch multiplies what it
unpacked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


_FOR_CPU, _FOR_CUDA = "quanto_cpp", "quanto_cuda"


class _Unpacking:
    """What the compiled extensions offer to unpack."""

    @staticmethod
    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        """Codes of `bits` bits, `(8 // bits * rows, ...)`: the lowest of all bytes come first."""
        import torch

        mask = 2**bits - 1
        return torch.cat([(packed >> place) & mask for place in range(0, 8, bits)])


def library() -> Any:
    """The package `optimum.quanto`."""
    from optimum import quanto
    from optimum.quanto.library.extensions import extension

    extension.get_extension(_FOR_CPU)._lib = _Unpacking
    for_cuda = extension._extensions.pop(_FOR_CUDA, None)  # who asks for it takes other kernels
    if for_cuda is not None:
        for_cuda._lib = _Unpacking
    return quanto
