"""Hidden states of prompts, kept where the model is: in this process, or in each of its workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Wish = tuple[str, int, int]  # a request, the input whose row comes first, how many rows


class Rows(Protocol):
    """States of requests by name, and what the output head makes of them."""

    def want(self, wishes: Sequence[Wish]) -> None:
        """Keep states of these inputs in the steps to come."""

    def complete(self, request: str) -> bool:
        """Whether all were computed; False where some were read from another one's cache."""

    def logprobs(self, request: str, begin: int, end: int) -> torch.Tensor:
        """Natural log-probabilities `(end - begin, vocab)` in float32 of kept rows."""

    def drop(self, requests: Sequence[str]) -> None:
        """Forget them."""


@dataclass
class _Wanted:
    """Rows `(keep, hidden)` of one request; `first` is the input whose row comes first."""

    first: int
    rows: torch.Tensor
    known: torch.Tensor  # (keep,) bool


class Taps:
    """Copies hidden states out of a model runner's steps (`Rows`)."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._wanted: dict[str, _Wanted] = {}
        # Called at the end of every step with the states of all tokens that were computed.
        runner._get_prompt_logprobs_dict = self._take

    def want(self, wishes: Sequence[Wish]) -> None:
        """See `Rows`."""
        import torch

        config = self._runner.model_config
        for request, first, keep in wishes:
            shape = (keep, config.get_hidden_size())
            rows = torch.empty(shape, dtype=config.dtype, device=self._runner.device)
            self._wanted[request] = _Wanted(first, rows, torch.zeros(keep, dtype=torch.bool))

    def complete(self, request: str) -> bool:
        """See `Rows`."""
        return bool(self._wanted[request].known.all())

    def logprobs(self, request: str, begin: int, end: int) -> torch.Tensor:
        """See `Rows`; None in all workers but the first, which gathers what each has computed."""
        import torch

        vocab = self._runner.model_config.get_vocab_size()
        with torch.inference_mode():
            states = self._wanted[request].rows[begin:end]
            logits = self._runner.get_model().compute_logits(states)
            if logits is None:
                return None  # type: ignore[return-value]
            return torch.log_softmax(logits[:, :vocab].float(), dim=-1)

    def drop(self, requests: Sequence[str]) -> None:
        """See `Rows`."""
        for request in requests:
            self._wanted.pop(request, None)

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


class WorkerTaps:
    """The same of a model that is split over workers: each keeps states, the first answers."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def want(self, wishes: Sequence[Wish]) -> None:
        """See `Rows`."""
        self._ask("want", list(wishes))

    def complete(self, request: str) -> bool:
        """See `Rows`."""
        return bool(self._ask("complete", request))

    def logprobs(self, request: str, begin: int, end: int) -> torch.Tensor:
        """See `Rows`; in this process's memory."""
        import torch

        return torch.from_numpy(self._ask("logprobs", request, begin, end).copy())

    def drop(self, requests: Sequence[str]) -> None:
        """See `Rows`; an engine that was closed has forgotten them."""
        if self._executor.rpc_broadcast_mq is not None:
            self._ask("drop", list(requests))

    def _ask(self, name: str, *arguments: Any) -> Any:
        return self._executor.collective_rpc("tap", args=(name, *arguments), unique_reply_rank=0)
