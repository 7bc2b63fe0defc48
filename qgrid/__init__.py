"""qgrid: a declarative grid of quantization experiments, verified and measured."""

__version__ = "0.1.0"
