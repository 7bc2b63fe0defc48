"""The `llamacpp-N` protocol against raw logits, and against llama.cpp's own tool where it is."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import yaml

from qgrid import demo
from qgrid.measure import quality
from qgrid.measure.encoding import Encoder
from qgrid.methods import gguf as method
from qgrid.types import Cell, Job, Measurement, Method, Prose, Runtime, Slices
from tests.jobs import CONF, options

Array = npt.NDArray[np.float64]
CONTEXT, TOKENS = 256, 2048
TOOL = shutil.which("llama-perplexity")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose of the embedded model that ends where the scored tokens end."""
    whole = (demo.SLICES_DIR / "prose.txt").read_text(encoding="utf-8")
    encoder = Encoder(demo.MODEL_DIR)
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(encoder.decode(encoder.prose(whole, TOKENS)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def make(make_cell: Callable[..., Cell], text: Path) -> Callable[[str, int], Cell]:
    """A cell of a GGUF type on the embedded model."""
    stored = yaml.safe_load((CONF / "runtime" / "llama_cpp.yaml").read_text())
    own = {k: v for k, v in stored.items() if k not in {"name", "dtype", "speed_dtype", "threads"}}
    runtime = Runtime("llama_cpp", "float32", "float32", 2, own)
    slices = Slices("prose", Prose(str(text), None, "llamacpp"), {})

    def one(kind: str, bits: int) -> Cell:
        asked = Method("gguf", method.resolved(bits, options("gguf", type=kind)))
        return make_cell(method=asked, bits=bits, runtime=runtime, slices=slices, context=CONTEXT)

    return one


@pytest.fixture(scope="module")
def folders(
    make: Callable[[str, int], Cell], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """GGUF artifacts by type."""
    found = {}
    for kind, bits in (("F16", 16), ("Q4_K_M", 4)):
        found[kind] = tmp_path_factory.mktemp(kind)
        method.quantize(make(kind, bits), demo.MODEL_DIR, found[kind])
    return found


@pytest.fixture(scope="module")
def raw(folders: dict[str, Path], text: Path) -> dict[str, Array]:
    """Log-probabilities `(windows, context, vocab)` of the library's own high-level interface."""
    return {kind: np.stack(list(logprobs(folder, text))) for kind, folder in folders.items()}


def logprobs(folder: Path, text: Path) -> Iterator[Array]:
    import llama_cpp

    model = llama_cpp.Llama(
        str(folder / "model.gguf"),
        n_ctx=CONTEXT,
        n_threads=2,
        logits_all=True,
        flash_attn=True,
        verbose=False,
    )
    for window in windows(text):
        model.reset()
        model.eval(window.tolist())
        logits = model.scores[:CONTEXT].astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        yield shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def windows(text: Path) -> npt.NDArray[np.int64]:
    ids = Encoder(demo.MODEL_DIR).text(text.read_text(encoding="utf-8"))
    count = len(ids) // CONTEXT
    return np.array(ids[: count * CONTEXT]).reshape(count, CONTEXT)


def measured(
    make_job: Callable[..., Job], cell: Cell, folder: Path, baseline: Path | None
) -> dict[str, Measurement]:
    result = quality.measure(make_job("quality", cell, folder, baseline))
    assert result.observed["ppl_protocol"] == f"llamacpp-{CONTEXT}"
    return {m.metric: m for m in result.measurements}


def test_perplexity_and_divergence_equal_those_of_the_raw_logits(
    make_job: Callable[..., Job],
    make: Callable[[str, int], Cell],
    folders: dict[str, Path],
    raw: dict[str, Array],
    text: Path,
) -> None:
    """Logits at N/2 to N-2 predict the tokens N/2+1 to N-1."""
    found = measured(make_job, make("Q4_K_M", 4), folders["Q4_K_M"], folders["F16"])
    ids = windows(text)
    places = np.s_[:, CONTEXT // 2 : CONTEXT - 1]
    targets = ids[:, CONTEXT // 2 + 1 :, None]
    base, cell = raw["F16"][places], raw["Q4_K_M"][places]
    nll = -np.take_along_axis(cell, targets, axis=2)
    divergence = (np.exp(base) * (base - cell)).sum(axis=2)
    same = (base.argmax(axis=2) == cell.argmax(axis=2)).mean()
    assert found["ppl"].n == nll.size == len(ids) * (CONTEXT - 1 - CONTEXT // 2)
    assert found["ppl"].value == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert found["kld_mean"].value == pytest.approx(divergence.mean(), rel=1e-3)
    assert found["same_top_p"].value == pytest.approx(same, abs=2 / nll.size)


@pytest.mark.skipif(TOOL is None, reason="llama-perplexity is not on the PATH")
def test_the_printed_digits_of_llama_perplexity(
    make_job: Callable[..., Job],
    make: Callable[[str, int], Cell],
    folders: dict[str, Path],
    text: Path,
    tmp_path: Path,
) -> None:
    base = str(tmp_path / "base.kld")
    printed = run_tool(folders["F16"], text, "--kl-divergence-base", base)
    plain = measured(make_job, make("F16", 16), folders["F16"], None)
    assert plain["ppl"].value == pytest.approx(
        number(r"Final estimate: PPL = ([\d.]+)", printed), abs=1.01e-4
    )
    printed = run_tool(folders["Q4_K_M"], text, "--kl-divergence-base", base, "--kl-divergence")
    found = measured(make_job, make("Q4_K_M", 4), folders["Q4_K_M"], folders["F16"])
    assert found["ppl"].value == pytest.approx(
        number(r"Mean PPL\(Q\)\s*:\s*([\d.]+)", printed), abs=1.01e-4
    )
    floor = 6e-4  # the tool keeps the base's log-probabilities in 16 bits
    assert found["kld_mean"].value == pytest.approx(
        number(r"Mean\s+KLD:\s*([\d.]+)", printed), abs=floor
    )


def run_tool(folder: Path, text: Path, *arguments: str) -> str:
    assert TOOL is not None
    command = [TOOL, "-m", str(folder / "model.gguf"), "-f", str(text), "-c", str(CONTEXT)]
    done = subprocess.run(
        [*command, "-t", "2", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text[-3000:]
    return float(found[1])
