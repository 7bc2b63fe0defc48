"""The embedded model: its weights and tokenizer, its slices, and the code that made them."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
SLICES_DIR = Path(__file__).parent / "slices"
