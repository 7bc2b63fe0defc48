"""GGUF files: made from a checkpoint, read, quantized, compared with the checkpoint."""
