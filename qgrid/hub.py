"""Why a file of the hub cannot be had: because there is none, or only at this moment."""

from __future__ import annotations

from qgrid.contracts import Unreachable, Unsupported

_FINAL_CODES = (401, 403, 404, 410, 451)  # nobody there, or not for this account


def failure(error: BaseException, path: str, absent: str) -> Unsupported | Unreachable:
    """What to raise for an error of the hub's library; `absent` is the sentence where it is final.

    Timeouts, a hub that is down or busy, and being offline pass: the cell is tried again.
    """
    if is_final(error):
        return Unsupported(f"{absent} ({type(error).__name__})")
    return Unreachable(
        f"`method.path={path}` cannot be had from the hub at this moment "
        f"({type(error).__name__}); run again when it can be, or give a path on this machine"
    )


def errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises; some errors of the network come as they are."""
    import httpx
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    return (OSError, httpx.HTTPError, EntryNotFoundError, HFValidationError)


def is_final(error: BaseException) -> bool:
    """Whether asking again gives the same answer: no such file, or no access to it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _FINAL_CODES
    return isinstance(error, HFValidationError)
