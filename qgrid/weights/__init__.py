"""Folders of weights: built once, read without torch, checked before every use."""
