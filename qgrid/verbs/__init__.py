"""Verbs of the command line that look after sweeps, the store and this machine."""
