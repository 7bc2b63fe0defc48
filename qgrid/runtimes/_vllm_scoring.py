"""Full log-probabilities from vLLM: hidden states of a prompt, kept on the way to the sampler.

vLLM's own prompt log-probabilities make a Python dictionary for every token and hold only the
likeliest. Here the final hidden states of the wanted tokens are copied out of every step, and the
output head is applied to at most 512 of them at a time: memory is bounded by hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qgrid.contracts import InvalidEngine, Scores
from qgrid.runtimes._batches import CHUNK_ROWS, Request, require_rows

if TYPE_CHECKING:
    import torch

GROUP_REQUESTS = 256  # that are under way at once
GROUP_BYTES = 256 * 2**20  # hidden states that wait for their turn
PROSE_ROWS = 32  # from here on a sequence is prose: nothing of it is taken from another one


@dataclass
class _Wanted:
    """Rows `(keep, hidden)` of one request; `first` is the input whose row comes first."""

    first: int
    rows: torch.Tensor
    known: torch.Tensor  # (keep,) bool


class Taps:
    """Copies hidden states out of a model runner's steps."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._wanted: dict[str, _Wanted] = {}
        # Called at the end of every step with the states of all tokens that were computed.
        runner._get_prompt_logprobs_dict = self._take

    def want(self, request: str, first: int, keep: int) -> None:
        """Keep the states of `keep` inputs from `first` on."""
        import torch

        config = self._runner.model_config
        shape = (keep, config.get_hidden_size())
        rows = torch.empty(shape, dtype=config.dtype, device=self._runner.device)
        self._wanted[request] = _Wanted(first, rows, torch.zeros(keep, dtype=torch.bool))

    def pop(self, request: str) -> torch.Tensor | None:
        """The states of a finished request; None where some were read from another one's cache."""
        wanted = self._wanted.pop(request)
        return wanted.rows if bool(wanted.known.all()) else None

    def _take(self, states: torch.Tensor, scheduled: Mapping[str, int]) -> dict[str, Any]:
        for request, count in scheduled.items():
            wanted = self._wanted.get(request)
            if wanted is not None:
                self._copy(wanted, states, request, count)
        return {}

    def _copy(self, wanted: _Wanted, states: torch.Tensor, request: str, count: int) -> None:
        begin = self._runner.requests[request].num_computed_tokens
        place = self._runner.input_batch.req_id_to_index[request]
        offset = int(self._runner.query_start_loc.np[place])
        low = max(begin, wanted.first)
        high = min(begin + count, wanted.first + len(wanted.rows))
        if low < high:
            into = slice(low - wanted.first, high - wanted.first)
            wanted.rows[into] = states[offset + low - begin : offset + high - begin]
            wanted.known[into] = True


class Scorer:
    """Computes `Engine.score` by running sequences through `engine` one token long."""

    def __init__(self, engine: Any, runner: Any) -> None:
        self._engine = engine
        self._model = runner.model
        self._taps = Taps(runner)
        config = runner.model_config
        self._row_bytes = config.get_hidden_size() * config.dtype.itemsize
        self._vocab = config.get_vocab_size()
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
            states = self._states(group)
            for request in group:
                start = len(request.ids) - request.keep - len(head)
                yield from self._scores(request.index, start, states.pop(request.index))

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

    def _states(self, group: Sequence[Request]) -> dict[int, torch.Tensor]:
        """Hidden states of every request, `(keep, hidden)`."""
        found: dict[int, torch.Tensor] = {}
        missing = self._run(group, found, shared=True)
        if missing:  # rows that were never computed, because another request's cache held them
            left = self._run(missing, found, shared=False)
            if left:
                raise InvalidEngine(f"vLLM did not compute all tokens of {len(left)} sequences")
        return found

    def _run(
        self, group: Sequence[Request], found: dict[int, torch.Tensor], shared: bool
    ) -> list[Request]:
        """Run the requests to their end; those whose states are not complete."""
        names: dict[str, Request] = {}
        for request in group:
            name = self._add(request, shared and request.keep < PROSE_ROWS)
            names[name] = request
        while self._engine.has_unfinished_requests():
            self._engine.step()
        missing = []
        for name, request in names.items():
            rows = self._taps.pop(name)
            if rows is None:
                missing.append(request)
            else:
                found[request.index] = rows
        return missing

    def _add(self, request: Request, shared: bool) -> str:
        """Start a request: all tokens but the last, which no wanted row depends on."""
        from vllm import SamplingParams

        inputs = list(request.ids[:-1])
        prompt = {"prompt_token_ids": inputs, "cache_salt": f"score {self._calls}"}
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            detokenize=False,
            ignore_eos=True,
            skip_reading_prefix_cache=not shared,
        )
        name = self._engine.add_request(f"score-{request.index}", prompt, params)
        self._taps.want(name, len(inputs) - request.keep, request.keep)
        return str(name)

    def _scores(self, index: int, start: int, states: torch.Tensor) -> Iterator[Scores]:
        import torch

        for begin in range(0, len(states), CHUNK_ROWS):
            with torch.inference_mode():
                logits = self._model.compute_logits(states[begin : begin + CHUNK_ROWS])
                rows = torch.log_softmax(logits[:, : self._vocab].float(), dim=-1)
            yield Scores(index, start + begin, rows)
