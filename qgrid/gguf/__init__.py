"""GGUF files: made from a checkpoint, read, quantized, compared with the checkpoint."""

PACKAGES = ("llama-cpp-python", "gguf")  # of what makes and reads them
