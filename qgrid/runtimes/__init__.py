"""Inference runtimes: one file a runtime, named like its YAML in `conf/runtime/`."""
