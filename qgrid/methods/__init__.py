"""Quantization methods: one file a method, named like its YAML in `conf/method/`."""
