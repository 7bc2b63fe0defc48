"""Options of a runtime that change nothing in a cell: one cell for all such choices."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qgrid import registry

if TYPE_CHECKING:
    from qgrid.types import KvCache, Runtime


def settled(runtime: Runtime, kv_cache: KvCache) -> Runtime:
    """The runtime with the options that its hook finds idle beside this cache as it leaves them."""
    own = getattr(registry.runtime(runtime.name), "settled_options", None)
    options = runtime.options if own is None else own(runtime.options, kv_cache)
    return runtime if options == runtime.options else replace(runtime, options=options)


def unheard(runtime: Runtime, kv_cache: KvCache) -> tuple[str, ...]:
    """A remark where options were given that nothing looks at."""
    left = settled(runtime, kv_cache).options
    idle = [f"`runtime.{key}`" for key, value in runtime.options.items() if left[key] != value]
    if not idle:
        return ()
    verb = "change" if len(idle) > 1 else "changes"
    return (f"{' and '.join(idle)} {verb} nothing with `kv_cache={kv_cache.name}`",)
