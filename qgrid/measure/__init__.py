"""Measures: one formula a metric, the same for every runtime."""
