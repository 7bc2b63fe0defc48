"""vLLM's own worker, which tells a census of its model and keeps states of prompts.

vLLM asks for the class by name (`worker_cls`) in the process that holds the model; it is made then,
because what it extends depends on the device.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from qgrid import codec, files
from qgrid.measure.process_memory import resident_bytes
from qgrid.runtimes import _vllm_census
from qgrid.runtimes._vllm_census import Census
from qgrid.runtimes._vllm_taps import Taps

CENSUS = "QGRID_VLLM_CENSUS"  # variable: the folder that receives the census of every worker
MAIN_CORE = "QGRID_VLLM_MAIN_CORE"  # variable: where OpenMP's first thread belongs


def __getattr__(name: str) -> Any:
    if name != "Worker":
        raise AttributeError(name)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    else:
        from vllm.v1.worker.gpu_worker import Worker as Base

    class Worker(Base):  # type: ignore[misc]
        """Adds nothing to what is computed."""

        def __init__(self, *args: Any, **arguments: Any) -> None:
            if MAIN_CORE in os.environ:
                os.sched_setaffinity(0, {int(os.environ[MAIN_CORE])})
            super().__init__(*args, **arguments)

        def compile_or_warm_up_model(self) -> Any:
            """As vLLM's; everything is loaded and set aside after it."""
            times = super().compile_or_warm_up_model()
            if CENSUS in os.environ:
                text = codec.dumps(_weighed(self))
                files.write_atomic(census_path(Path(os.environ[CENSUS]), self.rank), text)
            return times

        def census(self) -> tuple[Census, str]:
            """What is loaded here, and where the workers found each other."""
            return _vllm_census.take(self.model_runner), str(self.distributed_init_method)

        def tap(self, name: str, *arguments: Any) -> Any:
            """Call a method of this worker's `Taps`."""
            if not hasattr(self, "_taps"):
                self._taps = Taps(self.model_runner)
            found = getattr(self._taps, name)(*arguments)
            return found.cpu().numpy() if hasattr(found, "cpu") else found

    return Worker


def census_path(folder: Path, rank: int) -> Path:
    """Where a worker writes its census."""
    return folder / f"census-{rank}.json"


def _weighed(worker: Any) -> Census:
    census = _vllm_census.take(worker.model_runner)
    weighed: Any = _cuda_bytes(worker) if worker.device.type == "cuda" else _cpu_bytes(worker)
    return dataclasses.replace(census, **weighed)


def _cuda_bytes(worker: Any) -> dict[str, int]:
    """What vLLM's profile run found, and what torch holds once the graphs are captured."""
    import torch

    peak = getattr(worker, "peak_activation_memory", None)
    known = {} if peak is None else {"activation_peak_bytes": int(peak)}
    return {**known, "reserved_bytes": int(torch.cuda.memory_reserved())}


def _cpu_bytes(worker: Any) -> dict[str, int]:
    """Touch the pool, so that what the process grows by from now on is activations."""
    for cache in _vllm_census.tensors(worker.model_runner.kv_caches):
        cache.zero_()
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        return {}
    peak.write_text("5")  # the highest resident size is that of now
    return {"resident_bytes": resident_bytes("VmRSS")}
