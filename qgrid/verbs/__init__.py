"""What `python -m qgrid VERB` does beside running a grid."""
