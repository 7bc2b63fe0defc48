"""vLLM's own worker, which writes a census of its model once it is ready.

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

CENSUS = "QGRID_VLLM_CENSUS"  # variable: the file that receives the census
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
            if self.rank == 0:
                _write(self)
            return times

    return Worker


def _write(worker: Any) -> None:
    census = _vllm_census.take(worker.model_runner)
    weighed: Any = _cuda_bytes(worker) if worker.device.type == "cuda" else _cpu_bytes(worker)
    census = dataclasses.replace(census, **weighed)
    files.write_atomic(Path(os.environ[CENSUS]), codec.dumps(census))


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
