"""Connections to a server: a pool, a wait that ends, and what can go wrong on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from qgrid.serving.failures import RequestFailed, clean

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from qgrid.contracts import Endpoint

T = TypeVar("T")

_IDLE_SECONDS = 4.0  # servers often close a connection after five seconds without a request


@asynccontextmanager
async def session(endpoint: Endpoint, connections: int) -> AsyncIterator[ClientSession]:
    """A pool of at most `connections` connections, kept for as long as servers keep them.

    A proxy of the environment is used, except for hosts that it is not meant for (`NO_PROXY`).
    """
    import aiohttp

    connector = aiohttp.TCPConnector(limit=connections, keepalive_timeout=_IDLE_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # deadlines are per request
        headers={"Accept-Encoding": "identity"},  # a compressed stream comes in lumps
        cookie_jar=aiohttp.DummyCookieJar(),
        proxy=_proxy(endpoint.base_url),
        read_bufsize=2**18,
    ) as opened:
        yield opened


async def within(awaited: Awaitable[T], until: float, where: str, *, stalled: bool = False) -> T:
    """What `awaited` gives, before the moment `until`."""
    try:
        async with asyncio.timeout(max(0.0, until - time.perf_counter())):
            return await awaited
    except TimeoutError:
        reason = "the stream stood still for too long" if stalled else "the deadline has passed"
        raise RequestFailed("timeout", f"{where}: {reason}") from None


@contextmanager
def named(where: str, key: str | None) -> Iterator[None]:
    """What goes wrong on the connection, as `RequestFailed`."""
    import aiohttp

    try:
        yield
    except aiohttp.InvalidURL:
        raise RequestFailed("refused", f"{where}: not a URL", retryable=False) from None
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
        said = clean(str(error), key)
        raise RequestFailed("refused", f"{where}: {said}", retryable=False) from None
    except aiohttp.ClientConnectorError as error:
        said = clean(str(error), key)
        raise RequestFailed("refused", f"{where}: no connection: {said}") from None
    except aiohttp.ClientResponseError as error:  # what came is no HTTP
        said = clean(error.message, key)
        raise RequestFailed("garbage", f"{where}: not an HTTP answer: {said}") from None
    except (aiohttp.ClientError, ConnectionError) as error:
        said = clean(str(error) or type(error).__name__, key)
        raise RequestFailed("reset", f"{where}: the connection ended: {said}") from None


def headers(endpoint: Endpoint, url: str) -> dict[str, str]:
    """The key, for the endpoint's own host only."""
    base = endpoint.base_url.rstrip("/")
    own = url.startswith(f"{base}/") or urlsplit(url)[:2] == urlsplit(base)[:2]
    return {"Authorization": f"Bearer {endpoint.key}"} if own and endpoint.key is not None else {}


def _proxy(url: str) -> str | None:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in {"localhost", "127.0.0.1", "::1"} or proxy_bypass(host):
        return None
    return getproxies().get(parts.scheme)
