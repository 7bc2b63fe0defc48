"""llama.cpp through llama-cpp-python's low-level interface, on a CPU or a GPU it was built for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveInt

from qgrid.contracts import Generation, InvalidEngine, Memory, Scores
from qgrid.device import compute_threads
from qgrid.runtimes import _llama_facts, _llama_kernels
from qgrid.runtimes._llama_figures import ModelFigures
from qgrid.runtimes._llama_generation import Batcher
from qgrid.runtimes._llama_model import Context, Model, Placement, Room, Settings
from qgrid.runtimes._llama_scoring import Scorer
from qgrid.types import Check, RuntimeSupport

if TYPE_CHECKING:
    from qgrid.gguf.file import Header
    from qgrid.types import Cell

WEIGHTS = "model.gguf"


@dataclass(frozen=True)
class KvType:
    """A type of the KV cache: ggml's number and name, bits of a stored key or value."""

    number: int
    name: str
    bits: float


KV_TYPES = {
    "auto16": KvType(1, "f16", 16),
    "int8": KvType(8, "q8_0", 8.5),
    "int5": KvType(7, "q5_1", 6),
    "int4": KvType(2, "q4_0", 4.5),
}
LOADS = RuntimeSupport(
    loads={"cpu": ("gguf",), "cuda": ("gguf",)},
    kv_cache={"cpu": tuple(KV_TYPES), "cuda": tuple(KV_TYPES)},
    packages=("llama-cpp-python", "gguf"),
    baseline="gguf",
    dtypes=("float32",),
    keeps_stored=True,
)
_MIB_ROUNDING = 0.01 * 2**20  # of sizes in the log
_MAX_PLACES = 256  # sequences that the library takes at once
_OUTPUT_BYTES = 16 * 2**20  # logits that one pass of generation may set aside
_LEAST_TOKENS = 16  # of a pass: it has to hold one of each sequence


@dataclass(frozen=True)
class Options:
    """Options of this runtime."""

    gpu_layers: NonNegativeInt | None
    flash_attention: bool
    batch: PositiveInt
    ubatch: PositiveInt
    mmap: bool
    kernel: str


def refusal(cell: Cell) -> str | None:
    """Why the options of a cell cannot go together."""
    options = Options(**cell.runtime.options)
    kv = KV_TYPES.get(cell.kv_cache.name)
    if kv is not None and kv.bits < 16 and not options.flash_attention:
        return (
            f"`kv_cache={cell.kv_cache.name}` needs flash attention in llama.cpp; set "
            "`runtime.flash_attention=true`"
        )
    if not _LEAST_TOKENS <= options.ubatch <= options.batch:
        return (
            f"`runtime.ubatch={options.ubatch}` should be between {_LEAST_TOKENS} and "
            f"`runtime.batch={options.batch}`"
        )
    return _llama_kernels.refusal(cell, options.kernel)


def kv_bits(cell: Cell) -> float:
    """Bits of a stored key or value, the scales of its block included."""
    return KV_TYPES[cell.kv_cache.name].bits


class LlamaCpp:
    """A loaded GGUF file (an `Engine`)."""

    def __init__(self, model: Model, header: Header, cell: Cell) -> None:
        self._model = model
        self._header = header
        self._cell = cell
        self._options = Options(**cell.runtime.options)
        self._kv = KV_TYPES[cell.kv_cache.name]
        self._settings = Settings(
            threads=compute_threads(cell.runtime.threads),
            batch=self._options.batch,
            ubatch=self._options.ubatch,
            flash_attention=self._options.flash_attention,
            kv_type=self._kv.number,
        )
        self._linears = _llama_kernels.modules(header, model.figures)
        self._contexts: dict[bool, Context] = {}
        self._latest = self._context(self._room(places=1, cells=1))
        self._scorer = Scorer(
            self._context, self._options.ubatch, model.vocab, self._settings.threads
        )

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int] = ()
    ) -> Iterator[Scores]:
        """See `Engine.score`."""
        return self._scorer.score(sequences, keep, prefix)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] = ()
    ) -> list[Generation]:
        """See `Engine.generate`; requests share passes, so each has times of its own."""
        if not prompts or max_new_tokens < 1:
            return [Generation((), ()) for _ in prompts]
        longest = max(len(prompt) for prompt in prompts) + max_new_tokens
        places = min(len(prompts), _MAX_PLACES, self._options.ubatch)
        context = self._context(self._room(places, longest))
        return Batcher(context, places, max_new_tokens, frozenset(stop)).run(prompts)

    def memory(self) -> Memory:
        """See `Engine.memory`: the library's buffers of weights, and its cache for one token."""
        weights = sum(self._model.figures.weights_bytes.values())
        contexts = (each.figures for each in self._contexts.values())
        whole = weights + sum(each.kv_bytes + each.compute_bytes for each in contexts)
        on_gpu = self._cell.gpu.kind == "cuda"
        return Memory(weights, self._kv_bytes_per_token(), whole if on_gpu else None)

    def kernels(self) -> Mapping[str, int]:
        """Matrices by type: each type has its own multiplication. A tied head is none."""
        kinds = (t.type.name for t in self._header.tensors.values() if len(t.shape) > 1)
        return dict(Counter(kinds).most_common())

    def observed(self) -> Mapping[str, Any]:
        """See `Engine.observed`; sizes of buffers and types are what the library says."""
        loaded, held = self._model.figures, self._latest.figures
        single, many = self._latest.threads()
        return {
            "device": next(iter(loaded.devices.values()), "cpu") if loaded.offloaded else "cpu",
            "device_kind": _kind(loaded),
            "kernels": dict(self.kernels()),
            "kernel": _llama_kernels.name(self._linears),
            "linear_kernels": self._linears,
            "stores_in": dict(_llama_facts.linears(self._header)),
            "tensor_types": self._header.histogram(),
            "file_type": _llama_facts.file_type(self._header),
            "compute_dtype": "of llama.cpp's choice",
            "kv_dtype": held.key_type,
            "attn_implementation": "flash" if held.flash_attention else "plain",
            "threads": single,
            "threads_batch": many,
            "batch": self._options.batch,
            "ubatch": self._options.ubatch,
            "gpu_layers": {"offloaded": loaded.offloaded, "of": loaded.layers + 1},
            "weights_buffers_bytes": loaded.weights_bytes,
            "kv_buffer_bytes": held.kv_bytes,
            "kv_cells": held.cells,
            "compute_buffer_bytes": held.compute_bytes,
            "repacked": bool(loaded.repacked),
            "mmap": any("Mapped" in name for name in loaded.weights_bytes),
            "unread_table_bytes": _llama_facts.unread_table(self._header),
            **_llama_facts.library(),
        }

    def checks(self) -> Sequence[Check]:
        """See `Engine.checks`."""
        held, loaded = self._latest.figures, self._model.figures
        flash = self._options.flash_attention
        return (
            _gpu_check(self._cell, self._options.gpu_layers, loaded),
            _llama_kernels.check(self._options.kernel, self._linears),
            Check(
                "kv_type",
                ok=held.key_type == held.value_type == self._kv.name,
                expected=f"keys and values in {self._kv.name}",
                actual=f"keys in {held.key_type}, values in {held.value_type}",
            ),
            Check(
                "flash_attention",
                ok=held.flash_attention == flash,
                expected="on" if flash else "off",
                actual="on" if held.flash_attention else "off",
                fatal=False,
            ),
        )

    def close(self) -> None:
        """Free the caches, then the weights."""
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()
        self._model.close()

    def _room(self, places: int, cells: int) -> Room:
        """Of a context for generation; the library's own default would set aside every row."""
        rows = min(self._options.ubatch, _OUTPUT_BYTES // (4 * self._model.vocab))
        return Room(places, cells, shared=False, outputs=max(places, rows))

    def _context(self, room: Room) -> Context:
        """The context of this kind where it holds enough, else a new one in its place."""
        held = self._contexts.get(room.shared)
        if held is not None and held.room.holds(room):
            return held
        if held is not None:
            del self._contexts[room.shared]
            held.close()
        self._latest = self._contexts[room.shared] = Context(self._model, self._settings, room)
        return self._latest

    def _kv_bytes_per_token(self) -> int:
        """Bytes of one token in the cache, held against the library's buffer.

        Raises:
            InvalidEngine: its buffer has another size.
        """
        loaded, held = self._model.figures, self._latest.figures
        exact = (loaded.key_width + loaded.value_width) * self._kv.bits / 8
        if abs(exact * held.cells - held.kv_bytes) > _MIB_ROUNDING:
            raise InvalidEngine(
                f"the KV cache of {held.cells} tokens should take {exact * held.cells:.0f} bytes "
                f"in {self._kv.name}, but llama.cpp holds {held.kv_bytes}"
            )
        return round(exact)


def load(artifact: Path, cell: Cell, dtype: str) -> LlamaCpp:
    """Load `model.gguf` of `artifact`; `dtype` is `float32`, the only one that is declared.

    Raises:
        InvalidEngine: weights, layers on a GPU or the kernel are not what the cell says.
        LlamaError, MemoryError: the library cannot load it, or has no memory for it.
    """
    from qgrid.gguf import file

    header = file.read(artifact / WEIGHTS)
    _llama_facts.require_types(header, cell)
    options = Options(**cell.runtime.options)
    cuda = cell.gpu.kind == "cuda"
    asked = options.gpu_layers if cuda or options.gpu_layers is not None else 0
    gpus = cell.gpu.count if cuda or asked else 0
    laid_out = _llama_kernels.uses_layouts(options.kernel)
    model = Model(artifact / WEIGHTS, Placement(asked, gpus, options.mmap, laid_out))
    check = _gpu_check(cell, options.gpu_layers, model.figures)
    if check.fatal and not check.ok:
        raise InvalidEngine(
            f"`gpu={cell.gpu.name}` needs {check.expected}, but llama.cpp put {check.actual} "
            "there; install llama-cpp-python built with CUDA, or set `runtime.gpu_layers`"
        )
    kernel = _llama_kernels.check(options.kernel, _llama_kernels.modules(header, model.figures))
    if not kernel.ok:
        raise _llama_kernels.WrongKernel(options.kernel, kernel)
    return LlamaCpp(model, header, cell)


def _kind(figures: ModelFigures) -> str:
    """`cpu`, or what the library calls its GPUs without their number: `cuda`, `metal`, `vulkan`."""
    name = next(iter(figures.devices), "") if figures.offloaded else ""
    return name.rstrip("0123456789").lower() or "cpu"


def _gpu_check(cell: Cell, asked: int | None, figures: ModelFigures) -> Check:
    """Layers on a GPU; the library counts the output head as one."""
    everything = figures.layers + 1
    if asked is None:
        asked = everything if cell.gpu.kind == "cuda" else 0
    # More than there are means all, where there is a GPU to take them.
    reached = figures.offloaded == min(asked, everything)
    return Check(
        "gpu_layers",
        ok=reached,
        expected=f"{asked} layers on a GPU",
        actual=f"{figures.offloaded} of {everything}",
        fatal=cell.gpu.kind == "cuda",
    )
