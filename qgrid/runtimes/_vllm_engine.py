"""vLLM in this process: token ids in; log-probabilities, ids and times out."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.contracts import Generation, Memory, Scores, Unsupported
from qgrid.runtimes import _vllm_census, _vllm_checks, _vllm_worker
from qgrid.runtimes import _vllm_settings as settings
from qgrid.runtimes._vllm_scoring import Scorer
from qgrid.runtimes._vllm_taps import Taps, WorkerTaps

if TYPE_CHECKING:
    from qgrid.runtimes._vllm_census import Census
    from qgrid.runtimes._vllm_taps import Rows
    from qgrid.types import Cell, Check

_SHARED = Path("/dev/shm")  # noqa: S108 - vLLM's choice
_alive: set[int] = set()  # engines of this process that are not closed
_meetings: set[Path] = set()  # files by which vLLM's processes would find each other


class Vllm:
    """A loaded model (an `Engine`)."""

    def __init__(self, artifact: Path, cell: Cell, dtype: str) -> None:
        self._cell = cell
        self._dtype = dtype
        parts = settings.parallel(cell)
        arguments = settings.engine_arguments(artifact, cell, dtype)
        self._sockets: Path | None = None
        if parts > 1:
            arguments["worker_cls"] = f"{_vllm_worker.__name__}.Worker"
            self._sockets = Path(tempfile.mkdtemp(prefix="qgrid-vllm-"))
            os.environ["VLLM_RPC_BASE_PATH"] = str(self._sockets)  # vLLM removes none of them
        try:
            self._engine = _started(arguments)
        except BaseException:
            self._remove_sockets()
            raise
        self.positions = int(self._engine.model_config.max_model_len)
        taps, self._census = _several(self._engine) if parts > 1 else _single(self._engine)
        self._scorer = Scorer(self._engine, taps)
        _alive.add(id(self))
        told = settings.too_small(artifact, cell, self.positions)
        if told is not None:
            self.close()
            raise Unsupported(told)

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int] = ()
    ) -> Iterator[Scores]:
        """See `Engine.score`."""
        return self._scorer.score(sequences, keep, prefix)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] = ()
    ) -> list[Generation]:
        """See `Engine.generate`; a token's time is that of the step that gave it."""
        if not prompts or max_new_tokens < 1:
            return [Generation((), ()) for _ in prompts]
        params = _greedy(max_new_tokens, stop)
        begin = time.perf_counter()
        replies = {
            self._engine.add_request(
                f"generate-{i}", {"prompt_token_ids": list(prompt)}, params.clone()
            ).rsplit("-", 1)[0]: _Reply()
            for i, prompt in enumerate(prompts)
        }
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter() - begin
            for output in outputs:
                replies[output.request_id].take(output.outputs[0].token_ids, now)
        return [reply.until(frozenset(stop)) for reply in replies.values()]

    def memory(self) -> Memory:
        """See `Engine.memory`; the pool is a setting, so the highest memory tells of no need."""
        census = self._census
        return Memory(
            weights_bytes=census.weights_bytes,
            kv_bytes_per_token=census.kv_bytes_per_token,
            kv_pool_bytes=census.kv_pool_bytes,
            max_concurrency=census.max_concurrency(self._cell.context),
        )

    def kernels(self) -> Mapping[str, int]:
        """See `Engine.kernels`."""
        return _vllm_checks.kernels(self._census)

    def observed(self) -> Mapping[str, Any]:
        """See `Engine.observed`."""
        return _vllm_checks.observed(self._census, self._cell, self._dtype)

    def checks(self) -> Sequence[Check]:
        """See `Engine.checks`."""
        threads = len(settings.cores(self._cell))
        return _vllm_checks.checks(self._census, self._cell, threads)

    def close(self) -> None:
        """End the engine and free its memory; another one in this process goes on."""
        _alive.discard(id(self))
        _end(self._engine.engine_core, alone=not _alive)
        del self._scorer, self._engine
        gc.collect()
        self._remove_sockets()
        if self._cell.gpu.kind == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _remove_sockets(self) -> None:
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)


@dataclass
class _Reply:
    """New ids of a request as they come, with their times."""

    ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def take(self, ids: Sequence[int], now: float) -> None:
        self.ids.extend(ids)
        self.seconds.extend([now] * len(ids))

    def until(self, stop: frozenset[int]) -> Generation:
        """Without the token that ended it."""
        length = next((i for i, token in enumerate(self.ids) if token in stop), len(self.ids))
        return Generation(tuple(self.ids[:length]), tuple(self.seconds[:length]))


def prepare(cell: Cell) -> None:
    """Set up this process for engines of `cell`, before vLLM is imported."""
    os.environ.update(settings.environment(cell))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the default on a GPU; states are taken from V1's
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process may have touched a GPU
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if cell.gpu.kind == "cpu":
        import torch

        # vLLM's first engine replaces `torch.set_num_threads` by a function that does nothing.
        torch._C.set_num_threads(len(settings.cores(cell)))


def _started(arguments: Mapping[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(EngineArgs(**arguments))


def _single(engine: Any) -> tuple[Rows, Census]:
    """States and census of a model in this process."""
    worker = engine.model_executor.driver_worker.worker
    _remember(worker.distributed_init_method)
    return Taps(worker.model_runner), _vllm_census.take(worker.model_runner)


def _several(engine: Any) -> tuple[Rows, Census]:
    """States and census of a model in workers: their executor is in this process."""
    executor = engine.engine_core.engine_core.model_executor
    found = executor.collective_rpc("census")
    _remember(found[0][1])
    return WorkerTaps(executor), _vllm_census.joined([census for census, _ in found])


def _remember(meeting: str) -> None:
    if meeting.startswith("file://"):
        _meetings.add(Path(meeting.removeprefix("file://")))


def _end(client: Any, alone: bool) -> None:
    """vLLM's own shutdown ends what all engines of a process share: for the last one only."""
    if alone:
        client.shutdown()
        while _meetings:
            meeting = _meetings.pop()
            meeting.unlink(missing_ok=True)
            for segment in _SHARED.glob(f"{meeting.name}-*"):  # of workers on a CPU
                segment.unlink(missing_ok=True)
        return
    client._finalizer.detach()
    core = client.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()


def _greedy(max_new_tokens: int, stop: Sequence[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=max_new_tokens,
        stop_token_ids=list(stop),
        ignore_eos=True,  # what ends a reply is `stop` alone
        detokenize=False,
        skip_reading_prefix_cache=True,  # a prompt is read anew, even when it was scored before
        output_kind=RequestOutputKind.DELTA,
    )
