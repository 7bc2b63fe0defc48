"""Makes the committed grids a group: `+sweeps=NAME`."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from qgrid import config


class SweepsSearchPath(SearchPathPlugin):
    """Appends the folder that holds `sweeps/`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the parent of `sweeps/` at the end, so that a user's own grids come first."""
        search_path.append(provider="qgrid-sweeps", path=f"file://{config.root('sweeps').parent}")
