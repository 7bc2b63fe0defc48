"""In the place of torch where cells are trivial: what qgrid asks of it without computing."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

cuda = SimpleNamespace(_is_in_bad_fork=lambda: False)
sys.modules["safetensors.torch"] = ModuleType("safetensors.torch")  # imported ahead, never used
