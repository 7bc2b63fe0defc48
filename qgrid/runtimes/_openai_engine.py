"""A model behind an endpoint: an `Engine` for quality, a `Server` for the timing of its load."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qgrid.contracts import Endpoint, Generation, Memory, NoLogprobs, TopScores
from qgrid.runtimes import _openai_checks as checks
from qgrid.runtimes import _openai_probe as probe
from qgrid.runtimes import _openai_rows as rows
from qgrid.runtimes._openai_client import COMPLETIONS, Client
from qgrid.serving.failures import RequestFailed

if TYPE_CHECKING:
    from qgrid.measure.encoding import Encoder
    from qgrid.runtimes._openai_probe import Abilities
    from qgrid.runtimes.openai import Options
    from qgrid.types import Cell, Check

_ROUNDS = 4  # requests of a part, for each connection: answers of one part are held at once
_COUNTED = ("sent", "retried", "failed")
_OWN_CACHE = {"llamacpp": {"cache_prompt": False}}  # by owner: keeps every prompt of a load cold


@dataclass(frozen=True)
class _Found:
    """What the server told when it was asked first."""

    model: str
    entry: Mapping[str, Any] | None  # of the model in the server's list
    names: Sequence[str]  # of all that it lists
    able: Abilities
    verdicts: tuple[Check, ...]
    tokenizer: str  # how its tokenizer was asked


def opened(artifact: Path, cell: Cell, options: Options) -> Remote:
    """Ask the server what it is; see `qgrid.runtimes.openai.load`."""
    from qgrid.measure.encoding import Encoder

    encoder = Encoder(artifact, cell.model.trust_remote_code)
    endpoint = Endpoint(options.base_url.rstrip("/"), "", key=options.key())
    client = Client(endpoint, options.deadline_seconds, options.retries, options.concurrency)
    try:
        found = _asked(client, cell, options, encoder)
        extra = _load_fields(client, found)
    except BaseException:
        client.close()
        raise
    owner = str((found.entry or {}).get("owned_by"))
    client.endpoint = Endpoint(
        endpoint.base_url,
        found.model,
        {**extra, **_OWN_CACHE.get(owner, {})},
        endpoint.key,
        _metrics(client),
    )
    return Remote(client, found, encoder, options)


def _asked(client: Client, cell: Cell, options: Options, encoder: Encoder) -> _Found:
    listed = probe.listed(client)
    model = checks.name_of(options.model, listed)
    bos = [] if encoder.bos is None else [encoder.bos]
    ids = [*bos, *encoder.text(probe.PROBE)]
    able = probe.abilities(client, options, model, ids, probe.PROBE)
    agreed, way = checks.check_tokenizer(client, model, encoder, able)
    entry = next((each for each in listed if each.get("id") == model), None)
    longest = checks.positions(entry)
    verdicts = (
        checks.check_model(options.model, listed),
        checks.check_answered(model, able.answer),
        agreed,
        *(() if longest is None else (checks.check_length(longest, cell),)),
    )
    if any(check.fatal and not check.ok for check in verdicts):
        raise checks.failed(*verdicts)
    return _Found(model, entry, [str(each.get("id")) for each in listed], able, verdicts, way)


def _load_fields(client: Client, found: _Found) -> dict[str, Any]:
    """What makes every request of a load equally long, where the server takes that."""
    wanted = {"ignore_eos": True}
    body = {"model": found.model, "prompt": probe.PROBE, "max_tokens": 1, "temperature": 0}
    try:
        client.post(COMPLETIONS, {**body, **wanted})
    except RequestFailed:
        return {}
    return wanted


def _metrics(client: Client) -> str | None:
    """Where the server tells its own figures; None: nowhere."""
    url = client.endpoint.base_url.removesuffix("/v1") + "/metrics"
    try:
        return url if "# TYPE" in client.text(url) else None
    except RequestFailed:
        return None


class Remote:
    """What an endpoint serves. `truncated`: its rows are `TopScores`, or there are none."""

    truncated = True

    def __init__(self, client: Client, found: _Found, encoder: Encoder, options: Options) -> None:
        self.endpoint = client.endpoint
        self.positions = checks.positions(found.entry)
        self._client = client
        self._found = found
        self._able = found.able
        self._encoder = encoder
        self._options = options
        self._part = _ROUNDS * options.concurrency
        self._respelled = 0

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int] = ()
    ) -> Iterator[TopScores]:
        """See `Engine.score`; one row set a sequence, in order, truncated to the likeliest."""
        texts = [[*prefix, *sequence] for sequence in sequences]
        return self._scored(texts, keep, self._able.top)

    def chosen(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> Iterator[TopScores]:
        """See `Engine`: no lists, which would be most of an answer."""
        return self._scored([list(each) for each in sequences], keep, 0)

    def _scored(
        self, texts: Sequence[list[int]], keep: Sequence[int], top: int
    ) -> Iterator[TopScores]:
        if not self._able.echo:
            raise NoLogprobs(self._able.why)
        for begin in range(0, len(texts), self._part):
            part = list(zip(texts, keep, strict=True))[begin : begin + self._part]
            bodies = [self._echo(ids, top) for ids, _ in part]
            answers = self._client.ask(bodies, partial(_row, part))
            for number, (found, (ids, kept)) in enumerate(zip(answers, part, strict=True)):
                yield _scores(begin + number, len(ids) - kept, found, top)

    def _echo(self, ids: list[int], top: int) -> dict[str, Any]:
        asked = {"prompt": ids, "max_tokens": self._able.least, "echo": True, "logprobs": top}
        return {**self._able.body, **asked}

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] = ()
    ) -> list[Generation]:
        """See `Engine.generate`. An answer comes whole, so that all its tokens have one time."""
        more: dict[str, Any] = {"max_tokens": max_new_tokens}
        if self._able.names:
            more["logprobs"] = 1
        bodies = [{**self._able.body, "prompt": self.prompt(ids), **more} for ids in prompts]
        begin = time.perf_counter()
        ends = frozenset(stop)

        def read(answer: Mapping[str, Any], _: int) -> Generation:
            ids = rows.generated(answer, self._encoder.text)[:max_new_tokens]
            own = ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
            return Generation(own, (time.perf_counter() - begin,) * len(own))

        return [
            Generation((), (), str(each)) if isinstance(each, RequestFailed) else each
            for each in self._client.ask(bodies, read)
        ]

    def prompt(self, ids: Sequence[int]) -> list[int] | str:
        """See `Server.prompt`."""
        if self._able.ids:
            return list(ids)
        text = self._encoder.spelled(ids)
        lead = [] if self._encoder.bos is None else [self._encoder.bos]
        self._respelled += [*lead, *self._encoder.text(text)] != list(ids)
        return text

    def memory(self) -> Memory | None:
        """Nothing of another machine's memory is known."""
        return None

    def kernels(self) -> Mapping[str, int]:
        """Nothing is known of how the server computes."""
        return {}

    def observed(self) -> Mapping[str, Any]:
        """The server's own words, and how it was asked."""
        entry = {k: v for k, v in (self._found.entry or {}).items() if k != "permission"}
        able = self._able
        told = {
            "device": "remote",
            "server": {**entry, "system_fingerprint": able.answer.get("system_fingerprint")},
            "model": self._found.model,
            "models": list(self._found.names),
            "prompts": "ids" if able.ids else "text",
            "prompts_respelled": self._respelled,
            "logprobs": "echo" if able.echo else "none",
            "logprobs_why": able.why,
            "top_logprobs": able.top,
            "tokenizer_asked_by": self._found.tokenizer,
            "load_fields": dict(self.endpoint.extra),
            "quality_requests": {name: self._client.counts[name] for name in _COUNTED},
            "failed_attempts": dict(self._client.reasons),
        }
        asked = self._options.price
        return told if asked is None else {**told, "price": asdict(asked)}

    def checks(self) -> Sequence[Check]:
        """See `Engine.checks`: a fatal one has ended the cell before anything was asked."""
        return self._found.verdicts

    def close(self) -> None:
        """Close all connections."""
        self._client.close()


def _row(part: Sequence[tuple[list[int], int]], answer: Mapping[str, Any], number: int) -> rows.Row:
    ids, keep = part[number]
    return rows.echoed(answer, ids, keep)


def _scores(sequence: int, start: int, found: rows.Row | RequestFailed, top: int) -> TopScores:
    if isinstance(found, RequestFailed):
        ids, values = np.zeros((0, 0), np.int64), np.zeros((0, 0))
        return TopScores(sequence, start, ids, values, np.zeros(0), str(found))
    row = found if top else rows.without_lists(found)
    return TopScores(sequence, start, row.ids[:, :top], row.logprobs[:, :top], row.chosen)
