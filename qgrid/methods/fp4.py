"""FP4: four-bit floats between -1 and 1, a scale every 64 weights, by bitsandbytes.

Sign, two bits of exponent, one of mantissa, as twelfths: 0, 1/16, 2, 3, 4, 6, 8, 12. No hardware
multiplies this form; `nvfp4` and `mxfp4` are the ones that some does.
"""

from __future__ import annotations

from functools import partial

from qgrid.methods import _bitsandbytes_4bit as four

SUPPORTS = four.supports("fp4")
Options = four.Options
refusal = four.refusal
stored_bits = four.stored_bits
checks = four.checks
quantize = partial(four.quantize, values="fp4")
