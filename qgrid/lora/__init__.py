"""LoRA adapters: which one, does it fit, applied, and rightly."""
