"""Exact environments: one lock file each; they are part of the artifact ids."""
