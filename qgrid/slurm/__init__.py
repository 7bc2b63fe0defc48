"""Slurm: which arrays a plan becomes, their scripts, its commands, and the wait for the records."""
