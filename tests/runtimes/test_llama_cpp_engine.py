"""What a llama.cpp engine says about itself, and how it fails."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec
from qgrid.contracts import InvalidEngine
from qgrid.gguf import file as gguf_file
from qgrid.gguf.log import LlamaError
from qgrid.measure import loading, speed
from qgrid.measure.prose import divergence
from qgrid.runtimes import llama_cpp as runtime
from qgrid.runtimes._llama_figures import context_figures
from qgrid.runtimes._llama_model import Model, Placement
from qgrid.types import Cell, Gpu, Job, KvCache, PlannedCell, Workload
from tests.runtimes import random_gguf
from tests.runtimes.passes import some_ids

MakeCell = Callable[..., Cell]
SHAPE = random_gguf.SMALL
CUDA = Gpu("h200", "cuda", "H200", "sm_90", 141.0, None, 1)
KV = {"auto16": KvCache("auto16", 16), "int8": KvCache("int8", 8), "int5": KvCache("int5", 5)}
KV["int4"] = KvCache("int4", 4)
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tiny_random: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the same sizes as `tiny_random`, F16."""
    made = tmp_path_factory.mktemp("random")
    random_gguf.write(made / runtime.WEIGHTS, SHAPE)
    shutil.copy(tiny_random / "config.json", made)
    return made


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as Q4_0."""
    made = tmp_path_factory.mktemp("packed")
    random_gguf.quantize(folder / runtime.WEIGHTS, made / runtime.WEIGHTS, random_gguf.Q4_0)
    return made


def outcome(engine: runtime.LlamaCpp) -> dict[str, tuple[bool, bool, str]]:
    return {each.name: (each.ok, each.fatal, each.actual) for each in engine.checks()}


def test_observed_is_what_the_file_and_the_library_say(folder: Path, llama_cell: MakeCell) -> None:
    engine = runtime.load(folder, llama_cell(), "float32")
    seen = engine.observed()
    codec.dumps(seen)
    assert engine.kernels() == seen["kernels"] == {"F16": 15}  # fourteen linears and the table
    assert seen["stores_in"] == {"F16": 14}
    assert seen["tensor_types"] == {"F16": 15, "F32": 5}
    assert seen["file_type"] == "F16"
    assert (seen["device"], seen["device_kind"]) == ("cpu", "cpu")
    assert seen["threads"] == seen["threads_batch"] == 1
    assert seen["attn_implementation"] == "flash"
    assert seen["gpu_layers"] == {"offloaded": 0, "of": 3}
    assert not seen["mmap"]
    assert seen["compute_buffer_bytes"] > 0
    assert seen["llama_cpp_python"] == "0.3.36"
    assert outcome(engine) == {
        "gpu_layers": (True, False, "0 of 3"),
        "kernel": (True, True, "0 of 14 linear layers repacked"),
        "kv_type": (True, True, "keys in f16, values in f16"),
        "flash_attention": (True, False, "on"),
    }
    engine.close()


@pytest.mark.parametrize(
    ("name", "stored", "bits"),
    [("auto16", "f16", 16), ("int8", "q8_0", 8.5), ("int5", "q5_1", 6), ("int4", "q4_0", 4.5)],
)
def test_the_cache_is_held_as_asked(
    folder: Path, llama_cell: MakeCell, name: str, stored: str, bits: float
) -> None:
    cell = llama_cell(kv_cache=KV[name])
    assert runtime.kv_bits(cell) == bits
    engine = runtime.load(folder, cell, "float32")
    assert engine.observed()["kv_dtype"] == stored
    assert outcome(engine)["kv_type"][0]
    per_token = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * bits / 8
    assert engine.memory().kv_bytes_per_token == per_token
    engine.generate([[1, 2, 3]] * 8, 600)  # a larger cache has the same bytes a token
    assert engine.memory().kv_bytes_per_token == per_token
    assert engine.observed()["kv_cells"] == 8 * 768
    engine.close()


def test_a_narrower_cache_is_further_from_the_16_bit_one(
    folder: Path, llama_cell: MakeCell
) -> None:
    ids = some_ids(random.Random(0), 300)
    rows = {}
    for name, kv in KV.items():
        engine = runtime.load(folder, llama_cell(kv_cache=kv), "float32")
        rows[name] = next(engine.score([ids], [299])).logprobs
        engine.close()
    far = {name: float(divergence(rows["auto16"], found).mean()) for name, found in rows.items()}
    assert far["auto16"] == 0
    assert 0 < far["int8"] < far["int5"] < far["int4"]


def test_a_size_that_is_not_the_buffers_is_invalid(
    folder: Path, llama_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = runtime.load(folder, llama_cell(), "float32")
    monkeypatch.setattr(engine, "_kv", runtime.KV_TYPES["int8"])
    with pytest.raises(InvalidEngine, match=r"in q8_0, but llama\.cpp holds 262144"):
        engine.memory()
    assert not outcome(engine)["kv_type"][0]
    engine.close()


def test_a_cache_over_several_devices_is_rounded_once() -> None:
    """Each device's buffer is told to 0.01 MiB: eight of them would seem to lack a hundredth."""
    buffers = [f"llama_kv_cache:      CUDA{i} KV buffer size =     0.31 MiB" for i in range(8)]
    told = (
        "llama_kv_cache: size =    2.50 MiB (   512 cells,   8 layers,  4/4 seqs), "
        "K (f16):    1.25 MiB, V (f16):    1.25 MiB"
    )
    figures = context_figures([*buffers, told, "resolve_fused_ops: Flash Attention enabled"])
    assert figures.kv_bytes == 2.5 * 2**20
    assert (figures.cells, figures.key_type, figures.value_type) == (2048, "f16", "f16")


def test_weights_are_the_librarys_buffers(folder: Path, packed: Path, llama_cell: MakeCell) -> None:
    header = gguf_file.read(folder / runtime.WEIGHTS)
    exact = sum(tensor.nbytes for tensor in header.tensors.values())
    engine = runtime.load(folder, llama_cell(), "float32")
    assert engine.memory().weights_bytes == pytest.approx(exact, abs=2 * 2**20 * 0.005)
    plain = runtime.load(packed, llama_cell({"kernel": "plain"}, bits=4), "float32")
    laid = runtime.load(packed, llama_cell(bits=4), "float32")
    assert plain.memory().weights_bytes < 0.6 * exact
    assert not plain.observed()["repacked"]
    features = laid.observed()["backend"]
    assert laid.observed()["repacked"] == ("REPACK" in features and "AVX2" in features)
    mapped = runtime.load(folder, llama_cell({"mmap": True}), "float32")
    assert mapped.observed()["mmap"]
    for each in (engine, plain, laid, mapped):
        each.close()


def test_on_a_gpu_the_peak_is_the_librarys_account(folder: Path, llama_cell: MakeCell) -> None:
    """It does not allocate through torch, whose figure would be nothing."""
    header = gguf_file.read(folder / runtime.WEIGHTS)
    model = Model(folder / runtime.WEIGHTS, Placement(0, 0, mmap=False, repack=True))
    engine = runtime.LlamaCpp(model, header, llama_cell(gpu=CUDA))
    list(engine.score([[1, 2, 3]], [2]))
    contexts = [each.figures for each in engine._contexts.values()]
    assert len(contexts) == 2
    held = engine.memory()
    assert held.peak_bytes == held.weights_bytes + sum(
        each.kv_bytes + each.compute_bytes for each in contexts
    )
    engine.close()
    plain = runtime.load(folder, llama_cell(), "float32")
    assert plain.memory().peak_bytes is None  # the process's own peak counts
    plain.close()


def test_the_baseline_is_held_as_it_is_stored(
    folder: Path, llama_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it fits beside a cell: `float32` names the arithmetic, not the weights."""
    size = (folder / runtime.WEIGHTS).stat().st_size
    for free, fits in ((1.5, True), (1.3, False)):
        monkeypatch.setattr(loading, "_free_bytes", lambda _, free=free: free * size)
        assert loading.fits_beside(folder, llama_cell(), "float32") == fits


def test_a_table_that_is_not_the_head_is_not_read(folder: Path) -> None:
    from qgrid.runtimes._llama_facts import unread_table

    header = gguf_file.read(folder / runtime.WEIGHTS)
    assert unread_table(header) == 0
    table = header.tensors["token_embd.weight"]
    untied = dataclasses.replace(header, tensors={**header.tensors, "output.weight": table})
    assert unread_table(untied) == 2 * SHAPE.vocab * SHAPE.hidden


def test_flash_attention_can_be_left_out(folder: Path, llama_cell: MakeCell) -> None:
    engine = runtime.load(folder, llama_cell({"flash_attention": False}), "float32")
    assert engine.observed()["attn_implementation"] == "plain"
    assert outcome(engine)["flash_attention"] == (True, False, "off")
    other = runtime.load(folder, llama_cell(), "float32")
    ids = some_ids(random.Random(1), 200)
    first, second = (next(each.score([ids], [199])).logprobs for each in (engine, other))
    assert 0 < float(divergence(first, second).mean()) < 1e-5
    engine.close()
    other.close()


@pytest.mark.parametrize(
    ("options", "kv", "message"),
    [
        ({"flash_attention": False}, "int4", r"set `runtime\.flash_attention=true`"),
        ({"ubatch": 4}, "auto16", r"`runtime\.ubatch=4` should be between 16 and .*=2048`"),
        ({"batch": 256}, "auto16", r"`runtime\.ubatch=512` should be between 16 and .*=256`"),
    ],
)
def test_options_that_cannot_go_together(
    llama_cell: MakeCell, options: dict[str, Any], kv: str, message: str
) -> None:
    reason = runtime.refusal(llama_cell(options, kv_cache=KV[kv]))
    assert reason is not None
    assert re.search(message, reason)
    assert runtime.refusal(llama_cell(kv_cache=KV[kv])) is None


def test_layers_that_no_gpu_took_are_flagged(folder: Path, llama_cell: MakeCell) -> None:
    engine = runtime.load(folder, llama_cell({"gpu_layers": 99}), "float32")
    assert engine.observed()["gpu_layers"] == {"offloaded": 0, "of": 3}
    if not _has_gpu_build():
        assert outcome(engine)["gpu_layers"] == (False, False, "0 of 3")
    engine.close()


def test_a_cuda_cell_needs_its_layers_on_the_gpu(folder: Path, llama_cell: MakeCell) -> None:
    if _has_gpu_build():
        pytest.skip("this llama.cpp can use a GPU")
    with pytest.raises(InvalidEngine, match=r"needs 3 layers on a GPU, but llama\.cpp put 0 of 3"):
        runtime.load(folder, llama_cell(gpu=CUDA), "float32")


def _has_gpu_build() -> bool:
    import llama_cpp

    return bool(llama_cpp.llama_supports_gpu_offload())


def test_weights_of_another_width_are_invalid(
    folder: Path, packed: Path, llama_cell: MakeCell
) -> None:
    with pytest.raises(InvalidEngine, match=r"`bits=4` was asked for, .* holds 14 x F16"):
        runtime.load(folder, llama_cell(bits=4), "float32")
    with pytest.raises(InvalidEngine, match=r"16-bit weights were asked for, .* holds 14 x Q4_0"):
        runtime.load(packed, llama_cell(), "float32")


def test_a_torn_file_and_a_missing_tensor_are_told(
    folder: Path, llama_cell: MakeCell, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / runtime.WEIGHTS).read_bytes()
    (tmp_path / runtime.WEIGHTS).write_bytes(whole[:-4096])
    with pytest.raises(gguf_file.TornFile, match="its header says"):
        runtime.load(tmp_path, llama_cell(), "float32")
    (tmp_path / runtime.WEIGHTS).write_bytes(whole.replace(b"output_norm", b"0utput_norm"))
    with pytest.raises(LlamaError, match=r"cannot load model\.gguf: .*output_norm"):
        runtime.load(tmp_path, llama_cell(), "float32")
    assert capfd.readouterr().err == ""


def test_a_token_outside_the_vocabulary_is_an_error(folder: Path, llama_cell: MakeCell) -> None:
    engine = runtime.load(folder, llama_cell(), "float32")
    with pytest.raises(LlamaError, match=r"cannot compute 2 tokens .*invalid token\[1\] = 512"):
        engine.generate([[1, 512]], 2)
    assert len(engine.generate([[1, 2]], 2)[0].ids) == 2  # and the engine is as before
    engine.close()


def test_the_speed_stage_times_and_checks(
    folder: Path, llama_cell: MakeCell, tmp_path: Path
) -> None:
    cell = llama_cell({"gpu_layers": 99}, workload=Workload("test", 16, 4, (4,), 2, 5))
    planned = PlannedCell("cell", "artifact", "quality", None, cell, added=False)
    job = Job("speed", planned, str(folder), None, str(tmp_path), str(tmp_path))
    result = speed.measure(job)
    codec.dumps(result)
    found = {(each.metric, each.slice) for each in result.measurements}
    assert ("decode_throughput", "concurrency=4") in found
    names = {each.name for each in result.checks}
    assert names == {"gpu_layers", "kernel", "kv_type", "flash_attention"}


OWN_PROCESS = """
import os, resource, sys
from pathlib import Path
import qgrid.runtimes.llama_cpp as runtime
from qgrid import codec
from qgrid.types import Cell
folder, cell = Path(sys.argv[1]), codec.loads(Cell, sys.argv[2].encode())
"""
OUT_OF_MEMORY = """
engine = runtime.load(folder, cell, "float32")
held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, -1))
try:
    engine.generate([[1, 2]] * 64, 20000)
except MemoryError as error:
    sys.exit(0 if "cannot make a context of 64 x 20002 tokens" in str(error) else str(error))
sys.exit("nothing was refused")
"""
FORKED = """
import llama_cpp
pid = os.fork()
if pid == 0:
    made = runtime.load(folder, cell, "float32").generate([[1, 2, 3]], 20)
    os._exit(0 if len(made[0].ids) == 20 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and fork as on Linux")
@pytest.mark.parametrize("script", [OUT_OF_MEMORY, FORKED], ids=["memory", "fork"])
def test_in_a_process_of_its_own(folder: Path, llama_cell: MakeCell, script: str) -> None:
    """Memory that is refused is a `MemoryError`; a child of an importing parent computes."""
    cell = llama_cell()
    two = dataclasses.replace(cell, runtime=dataclasses.replace(cell.runtime, threads=2))
    done = subprocess.run(
        [sys.executable, "-c", OWN_PROCESS + script, str(folder), codec.dumps(two)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
