"""Full log-probabilities from vLLM: hidden states of a prompt, kept on the way to the sampler.

vLLM's own prompt log-probabilities make a Python dictionary for every token and hold only the
likeliest. Here the final hidden states of the wanted tokens are copied out of every step, and the
output head is applied to at most 512 of them at a time: memory is bounded by hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qgrid.contracts import InvalidEngine, Scores
from qgrid.runtimes._batches import CHUNK_ROWS, Request, require_rows

if TYPE_CHECKING:
    from qgrid.runtimes._vllm_taps import Rows, Wish

GROUP_REQUESTS = 256  # that are under way at once
GROUP_BYTES = 256 * 2**20  # hidden states that wait for their turn
PROSE_ROWS = 32  # from here on a sequence is prose: nothing of it is taken from another one


class Scorer:
    """Computes `Engine.score` by running sequences through `engine` one token long."""

    def __init__(self, engine: Any, taps: Rows) -> None:
        self._engine = engine
        self._taps = taps
        config = engine.model_config
        self._row_bytes = config.get_hidden_size() * config.dtype.itemsize
        self._calls = 0

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int]
    ) -> Iterator[Scores]:
        """See `Engine.score`."""
        head = tuple(prefix)
        requests = [
            Request(i, (*head, *ids), count)
            for i, (ids, count) in enumerate(zip(sequences, keep, strict=True))
        ]
        for request in requests:
            require_rows(request, len(head))
        self._calls += 1
        for group in self._groups(requests):
            names: dict[int, str] = {}
            try:
                self._compute(group, names)
                for request in group:
                    start = len(request.ids) - request.keep - len(head)
                    yield from self._scores(request, start, names[request.index])
            finally:
                self._taps.drop(list(names.values()))

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Successive requests whose states together stay under a bound; one window at least."""
        group: list[Request] = []
        rows = 0
        for request in requests:
            full = len(group) == GROUP_REQUESTS
            if group and (full or (rows + request.keep) * self._row_bytes > GROUP_BYTES):
                yield group
                group, rows = [], 0
            group.append(request)
            rows += request.keep
        if group:
            yield group

    def _compute(self, group: Sequence[Request], names: dict[int, str]) -> None:
        """Have the states of every request kept; `names` receives what each is kept under."""
        missing = self._run(group, names, shared=True)
        if missing:  # rows that were never computed, because another request's cache held them
            left = self._run(missing, names, shared=False)
            if left:
                raise InvalidEngine(f"vLLM did not compute all tokens of {len(left)} sequences")

    def _run(self, group: Sequence[Request], names: dict[int, str], shared: bool) -> list[Request]:
        """Run the requests to their end; those whose states are not complete."""
        self._taps.drop([names[each.index] for each in group if each.index in names])
        wishes: list[Wish] = []
        for request in group:
            name = self._add(request, shared and request.keep < PROSE_ROWS)
            names[request.index] = name
            wishes.append((name, len(request.ids) - 1 - request.keep, request.keep))
        self._taps.want(wishes)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return [each for each in group if not self._taps.complete(names[each.index])]

    def _add(self, request: Request, shared: bool) -> str:
        """Start a request: all tokens but the last, which no wanted row depends on."""
        from vllm import SamplingParams

        prompt = {
            "prompt_token_ids": list(request.ids[:-1]),
            "cache_salt": f"score {self._calls}",
        }
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            detokenize=False,
            ignore_eos=True,
            skip_reading_prefix_cache=not shared,
        )
        return str(self._engine.add_request(f"score-{request.index}", prompt, params))

    def _scores(self, request: Request, start: int, name: str) -> Iterator[Scores]:
        for begin in range(0, request.keep, CHUNK_ROWS):
            end = min(begin + CHUNK_ROWS, request.keep)
            yield Scores(request.index, start + begin, self._taps.logprobs(name, begin, end))
