"""What a server takes and gives, found out once by a few small requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qgrid.contracts import Unsupported
from qgrid.runtimes import _openai_rows as rows
from qgrid.runtimes._openai_client import COMPLETIONS, ServerLost
from qgrid.serving.failures import RequestFailed

if TYPE_CHECKING:
    from qgrid.runtimes._openai_client import Client
    from qgrid.runtimes.openai import Options

PROBE = "The quick brown fox jumps over the lazy dog."
# Fields beside the standard ones: ids instead of texts, nothing from an earlier prompt, and no
# penalty that the model's own generation settings may bring. A strict server gets none of them.
EXTENSIONS = {
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "cache_prompt": False,
    "repetition_penalty": 1.0,
}
_FEWER = (5, 1)  # likeliest tokens, where a server allows no more
_NOT_THERE = frozenset({404, 405, 501})


@dataclass(frozen=True)
class Abilities:
    """How the server is asked. `body` goes into every request."""

    ids: bool  # it takes token ids
    echo: bool  # and tells the log-probabilities of a prompt
    top: int  # likeliest tokens at every place
    least: int  # new tokens that it must make beside an echo
    body: Mapping[str, Any]
    answer: Mapping[str, Any] = field(repr=False)  # to the request that told so
    names: bool = False  # it names generated tokens by id only with `logprobs`
    why: str | None = None  # there is no echo


def listed(client: Client) -> list[dict[str, Any]]:
    """Models that the server lists; nothing where it has no such list.

    Raises:
        ServerLost: it cannot be reached.
        Unsupported: it wants a key, or another one.
    """
    try:
        answer = client.get("/models")
    except RequestFailed as failure:
        if failure.status in _NOT_THERE:
            return []
        raise _end(failure) from None
    found = answer.get("data")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def abilities(
    client: Client, options: Options, model: str, ids: Sequence[int], text: str
) -> Abilities:
    """The best way to ask this server that the options allow.

    Raises:
        ServerLost: it cannot be reached.
        Unsupported: it has no completions, or not the way that the options ask for.
    """
    refusals: list[RequestFailed] = []
    base = {"model": model, "temperature": 0, "seed": 0}
    for body in ({**base, **EXTENSIONS}, base):
        tries = [
            *(_echoes(client, options, body, ids) if options.logprobs != "none" else ()),
            partial(_plain, client, body, ids),
        ]
        for attempt in tries if options.prompts != "text" else ():
            found = _noted(attempt, refusals)
            if found is not None:
                return _as_asked(found, options, refusals)
        if options.prompts != "ids":
            found = _noted(partial(_plain, client, body, text), refusals)
            if found is not None:
                return _as_asked(found, options, refusals)
    raise Unsupported(
        f"the server at `runtime.base_url` answers no request to {COMPLETIONS} with "
        f"`runtime.prompts={options.prompts}`: {refusals[-1]}"
    )


def _echoes(
    client: Client, options: Options, body: Mapping[str, Any], ids: Sequence[int]
) -> list[Callable[[], Abilities]]:
    tops = dict.fromkeys((options.top_logprobs, *(k for k in _FEWER if k < options.top_logprobs)))
    return [partial(_echo, client, body, ids, top, least) for top in tops for least in (0, 1)]


def _echo(
    client: Client, body: Mapping[str, Any], ids: Sequence[int], top: int, least: int
) -> Abilities:
    wanted = {**body, "prompt": list(ids), "max_tokens": least, "echo": True, "logprobs": top}
    answer = client.post(COMPLETIONS, wanted)
    rows.echoed(answer, ids, len(ids) - 1)
    return Abilities(True, True, top, least, body, answer)


def _plain(client: Client, body: Mapping[str, Any], prompt: Sequence[int] | str) -> Abilities:
    """Ids or text, without log-probabilities of it."""
    is_text = isinstance(prompt, str)
    wanted = {**body, "prompt": prompt if is_text else list(prompt), "max_tokens": 2}
    answer = client.post(COMPLETIONS, wanted)
    made = rows.choice(answer)
    counted = rows.prompt_tokens(answer)
    if not is_text and counted not in {None, len(prompt)}:
        raise RequestFailed("garbage", f"{len(prompt)} token ids were taken for {counted} tokens")
    if not isinstance(made.get("text"), str):
        raise RequestFailed("garbage", "no text in the answer")
    names = made.get("token_ids") is None and _names_by_logprobs(client, wanted)
    return Abilities(not is_text, False, 0, 0, body, answer, names)


def _names_by_logprobs(client: Client, wanted: Mapping[str, Any]) -> bool:
    try:
        made = rows.choice(client.post(COMPLETIONS, {**wanted, "logprobs": 1}))
    except RequestFailed:
        return False
    return rows.content_ids(made.get("logprobs")) is not None


def _noted(attempt: Callable[[], Abilities], refusals: list[RequestFailed]) -> Abilities | None:
    """What an attempt found; a server's no is remembered, silence ends the search."""
    try:
        return attempt()
    except RequestFailed as failure:
        if failure.kind not in {"status", "garbage"} or failure.status in {401, 403, 429}:
            raise _end(failure) from None
        refusals.append(failure)
        return None


def _as_asked(found: Abilities, options: Options, refusals: Sequence[RequestFailed]) -> Abilities:
    """`found`, with the reason why there is no echo.

    Raises:
        Unsupported: the options insist on one.
    """
    if found.echo:
        return found
    why = (
        "`runtime.logprobs=none`"
        if options.logprobs == "none"
        else "`runtime.prompts=text`"
        if options.prompts == "text"
        else "the server gives no log-probabilities of a prompt"
    )
    if options.logprobs == "echo":
        said = f" ({refusals[0]})" if refusals else ""
        raise Unsupported(f"`runtime.logprobs=echo` cannot be had: {why}{said}")
    return replace(found, why=why)


def _end(failure: RequestFailed) -> Exception:
    if failure.status in {401, 403}:
        return Unsupported(
            f"the server wants another key: {failure}; put it into the environment variable that "
            "`runtime.api_key_env` names"
        )
    return ServerLost(f"the server cannot be asked: {failure}")
