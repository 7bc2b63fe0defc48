"""What the chunks of one streamed completion say: when tokens came, and how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qgrid.serving.failures import RequestFailed

if TYPE_CHECKING:
    from qgrid.serving.transport import Chunk

_MOST_TOKENS = 2**31  # of one request: more is no count


@dataclass(frozen=True)
class Answer:
    """Arrivals (`time.perf_counter()`) and counts; None where the server does not count."""

    arrivals: tuple[float, ...]
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int


def read(chunks: Sequence[Chunk]) -> Answer:
    """Every chunk with a choice is an arrival.

    But for a last one that only says why it ended, and for an empty first one where the server
    counts fewer tokens than that: some open their answers so.

    Raises:
        RequestFailed: a chunk is no JSON object, or there is no token at all.
    """
    said = [(chunk.moment, chunk.data) for chunk in chunks]
    arrivals = [(moment, _choice(data)) for moment, data in said if _choice(data) is not None]
    usage = _usage([data for _, data in said])
    output = _count(usage, "completion_tokens")
    if arrivals and _is_farewell(arrivals[-1][1], len(arrivals), output):
        arrivals.pop()
    if output is not None and len(arrivals) > max(output, 1) and not _text(arrivals[0][1]):
        arrivals.pop(0)
    if not arrivals or output == 0:
        where = chunks[0].where if chunks else "the request"
        raise RequestFailed("garbage", f"{where}: the answer holds no token")
    details = usage.get("prompt_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, Mapping) else None
    return Answer(
        tuple(moment for moment, _ in arrivals),
        _count(usage, "prompt_tokens"),
        output,
        0 if cached is None else cached,
    )


def _choice(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = data.get("choices")
    found = choices[0] if isinstance(choices, list) and choices else None
    return found if isinstance(found, Mapping) else None


def _is_farewell(choice: Mapping[str, Any] | None, arrivals: int, output: int | None) -> bool:
    """No text and a reason to end: no token, unless the server counted one for each arrival."""
    if choice is None or _text(choice) or not choice.get("finish_reason"):
        return False
    return output is None or arrivals > output


def _text(choice: Mapping[str, Any] | None) -> Any:
    return None if choice is None else choice.get("text")


def _usage(said: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The last count that the stream holds."""
    for data in reversed(said):
        usage = data.get("usage")
        if isinstance(usage, Mapping):
            return usage
    return {}


def _count(usage: Mapping[str, Any], key: str) -> int | None:
    value = usage.get(key)
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else None
