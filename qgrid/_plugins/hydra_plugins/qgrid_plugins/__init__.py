"""Hydra's plugins of qgrid: the sweeper, the launchers and the search path."""
