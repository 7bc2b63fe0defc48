"""NF4: four-bit codes of a normal distribution, a scale every 64 weights, by bitsandbytes."""

from __future__ import annotations

from functools import partial

from qgrid.methods import _bitsandbytes_4bit as four

SUPPORTS = four.supports("nf4")
Options = four.Options
refusal = four.refusal
stored_bits = four.stored_bits
checks = four.checks
quantize = partial(four.quantize, values="nf4")
