"""The line that qgrid reads without importing torch."""

cuda: str | None = None
