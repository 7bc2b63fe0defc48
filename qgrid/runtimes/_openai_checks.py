"""Whether a server serves the model that was asked for, with the tokenizer that prompts need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qgrid.contracts import InvalidEngine
from qgrid.runtimes import _openai_rows as rows
from qgrid.runtimes._openai_client import COMPLETIONS
from qgrid.serving.failures import RequestFailed
from qgrid.types import Check
from qgrid.weights.fingerprint import PROBES

if TYPE_CHECKING:
    from qgrid.measure.encoding import Encoder
    from qgrid.runtimes._openai_client import Client
    from qgrid.runtimes._openai_probe import Abilities
    from qgrid.types import Cell

_LENGTHS = ("max_model_len", "context_length", "n_ctx", "max_context_length")


def name_of(asked: str | None, listed: Sequence[Mapping[str, Any]]) -> str:
    """The model to ask for: the named one, else the first that the server lists.

    Raises:
        InvalidEngine: the server lists others only, or none and none was named.
    """
    known = [str(each.get("id")) for each in listed]
    if asked is None and not known:
        raise InvalidEngine(
            "the server lists no models: does `runtime.base_url` end where `/models` and "
            "`/completions` begin (in most servers with `/v1`)? If so, give `runtime.model`"
        )
    check = check_model(asked, listed)
    if not check.ok:
        raise failed(check)
    return known[0] if asked is None else asked


def check_model(asked: str | None, listed: Sequence[Mapping[str, Any]]) -> Check:
    """The server lists the model that was asked for, by its name or an alias."""
    known = {str(each.get("id")): each for each in listed}
    names = {*known, *(alias for each in listed for alias in _aliases(each))}
    goal = "the first that is listed" if asked is None else asked
    found = ", ".join(known) or "no list"
    return Check("served_model", asked is None or not known or asked in names, goal, found)


def _aliases(entry: Mapping[str, Any]) -> list[str]:
    found = entry.get("aliases")
    return [str(each) for each in found] if isinstance(found, list) else []


def check_answered(model: str, answer: Mapping[str, Any]) -> Check:
    """The answer names the model that was asked for; a dated name of the same one is noted."""
    said = answer.get("model")
    ok = said is None or said == model
    return Check("answering_model", ok, model, str(said), fatal=False)


def positions(entry: Mapping[str, Any] | None) -> int | None:
    """The longest sequence that the server's list of models tells; None: it does not."""
    if entry is None:
        return None
    meta = entry.get("meta")
    places = (entry, meta if isinstance(meta, Mapping) else {})
    named = (place.get(key) for place in places for key in _LENGTHS)
    return next((each for each in named if isinstance(each, int) and each > 0), None)


def check_length(longest: int, cell: Cell) -> Check:
    """The server takes what the cell will send."""
    load = cell.workload
    need = max(cell.context, load.prompt_tokens + load.output_tokens)
    return Check("served_length", need <= longest, f"{need} tokens or more", f"{longest} tokens")


def check_tokenizer(
    client: Client, model: str, encoder: Encoder, able: Abilities
) -> tuple[Check, str]:
    """The server's tokenizer encodes some texts as ours does, and by what it was asked.

    By `/tokenize` (vLLM, SGLang, llama.cpp), else by the number of tokens that it counts.
    """
    # as they would be sent: a server need not normalize what the tokenizer would
    texts = [encoder.spelled(encoder.text(text)) for text in PROBES]
    wanted = [encoder.text(text) for text in texts]
    goal = f"{len(texts)} texts as the model's tokenizer encodes them"
    try:
        found: list[Any] = [_tokenized(client, model, text) for text in texts]
        way = "tokenize"
    except RequestFailed:
        try:
            found = [_counted(client, model, text, able) for text in texts]
        except RequestFailed as failure:
            return Check("served_tokenizer", True, goal, f"not known: {failure}", False), "none"
        way = "usage"
    wrong = [
        f"{text!r} as {_short(theirs)} instead of {_short(ours)}"
        for text, ours, theirs in zip(texts, wanted, found, strict=True)
        if not _agree(ours, theirs, encoder.bos, able)
    ]
    if None in found:
        return Check("served_tokenizer", True, goal, "not known: no count", False), "none"
    return Check("served_tokenizer", not wrong, goal, wrong[0] if wrong else goal), way


def _agree(ours: list[int], theirs: Any, bos: int | None, able: Abilities) -> bool:
    """Ids, or their number: with BOS; without where prompts go as ids, which bring their own."""
    if not isinstance(theirs, int):
        return bool(ours == theirs)
    lead = int(bos is not None)
    return theirs == len(ours) + lead or (able.ids and theirs == len(ours))


def _tokenized(client: Client, model: str, text: str) -> list[int]:
    """The ids of a text, asked in the words of vLLM and of llama.cpp at once."""
    root = client.endpoint.base_url.rstrip("/").removesuffix("/v1")
    body = {
        "model": model,
        "prompt": text,
        "content": text,
        "add_special_tokens": False,
        "add_special": False,
        "parse_special": True,
    }
    found = client.post("/tokenize", body, base_url=root).get("tokens")
    if not isinstance(found, list) or not all(isinstance(each, int) for each in found):
        raise RequestFailed("garbage", "no ids in the answer")
    return found


def _counted(client: Client, model: str, text: str, able: Abilities) -> int | None:
    wanted = {**able.body, "model": model, "prompt": text, "max_tokens": 1}
    return rows.prompt_tokens(client.post(COMPLETIONS, wanted))


def failed(*checks: Check) -> InvalidEngine:
    """The end that failed checks mean; they go into the record with it."""
    first = next(check for check in checks if check.fatal and not check.ok)
    error = InvalidEngine(
        f"the server fails {first.name}: expected {first.expected}, found {first.actual}"
    )
    error.checks = checks  # type: ignore[attr-defined] # a stage's end keeps every verdict
    return error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
