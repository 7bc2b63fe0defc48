"""llama.cpp's model and context as objects: every failed C call becomes an exception."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.gguf import log
from qgrid.runtimes import _llama_figures as figures
from qgrid.runtimes._llama_figures import ContextFigures, ModelFigures
from qgrid.runtimes._llama_pieces import Piece

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]

CELL_STEP = 256  # the library rounds a context up to a multiple


@dataclass(frozen=True)
class Placement:
    """Where the weights go. `gpu_layers` is None for all; `gpus` is 0 to leave any GPU alone."""

    gpu_layers: int | None
    gpus: int
    mmap: bool
    repack: bool


@dataclass(frozen=True)
class Settings:
    """What every context of an engine shares; `kv_type` is ggml's number."""

    threads: int
    batch: int
    ubatch: int
    flash_attention: bool
    kv_type: int


@dataclass(frozen=True)
class Room:
    """How much a context holds: `cells` tokens for each of `places` sequences.

    In a `shared` one the cells are for all sequences together, and a token may belong to several.
    `outputs` bounds the rows of one pass for which memory is set aside.
    """

    places: int
    cells: int
    shared: bool
    outputs: int

    def holds(self, other: Room) -> bool:
        """Whether a context with this room serves where `other` is needed."""
        enough = self.places >= other.places and self.cells >= other.cells
        return enough and self.shared == other.shared


class Model:
    """Weights in memory."""

    def __init__(self, file: Path, placement: Placement) -> None:
        import llama_cpp

        llama_cpp.llama_backend_init()
        params = _model_params(placement)
        with log.captured() as said:
            self.pointer = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
            if not self.pointer:
                raise said.error(f"load {file.name}")
        self._free = weakref.finalize(self, _quietly, llama_cpp.llama_model_free, self.pointer)
        self.figures: ModelFigures = figures.model_figures(said.lines, said.detail_lines)
        self.vocab: int = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.pointer)
        )

    def close(self) -> None:
        """Free the weights; every context of the model must be closed."""
        self._free()


def _quietly(free: Callable[[Any], None], pointer: Any) -> None:
    with log.captured():
        free(pointer)


def _model_params(placement: Placement) -> Any:
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    layers = placement.gpu_layers
    params.n_gpu_layers = -1 if layers is None else layers  # of this library: all
    params.split_mode = (
        llama_cpp.LLAMA_SPLIT_MODE_LAYER if placement.gpus > 1 else llama_cpp.LLAMA_SPLIT_MODE_NONE
    )
    if placement.gpus == 0:
        none = (ctypes.c_void_p * 1)(None)  # a list of devices that ends at once
        params.devices = ctypes.cast(none, ctypes.c_void_p)
    mapped, plain = llama_cpp.LLAMA_LOAD_MODE_MMAP, llama_cpp.LLAMA_LOAD_MODE_NONE
    params.load_mode = mapped if placement.mmap else plain
    params.use_extra_bufts = placement.repack
    return params


class Context:
    """A KV cache and what computing with it needs.

    Every method belongs inside `log.captured()`: a failure tells what was logged.
    """

    def __init__(self, model: Model, settings: Settings, room: Room) -> None:
        import llama_cpp

        self.room = room
        self._library: Any = llama_cpp  # an import would cost a thousandth of a small model's step
        self._model = model  # freed after its contexts
        with log.captured() as said:
            params = _context_params(settings, room)
            self._pointer = llama_cpp.llama_init_from_model(model.pointer, params)
            if not self._pointer:
                raise said.error(f"make a context of {room.places} x {room.cells} tokens")
        self._free = weakref.finalize(self, _quietly, llama_cpp.llama_free, self._pointer)
        self.figures: ContextFigures = figures.context_figures(said.lines)
        self.batch: int = llama_cpp.llama_n_batch(self._pointer)
        self._memory = llama_cpp.llama_get_memory(self._pointer)
        self._tokens = _Tokens(self.batch, room.places)
        self._nothing = _nothing(model.vocab)
        self._view: tuple[tuple[int, int], Rows] | None = None

    def decode(self, pieces: Sequence[Piece]) -> Rows:
        """Logits `(rows, vocab)` of the wanted tokens; valid until the next call.

        All tokens together are at most `batch`.

        Raises:
            LlamaError, MemoryError: the library could not compute them.
        """
        count = self._tokens.fill(pieces)
        code = self._library.llama_decode(self._pointer, self._tokens.struct)
        if code:
            raise log.error(f"compute {self._tokens.struct.n_tokens} tokens (code {code})")
        self._library.llama_synchronize(self._pointer)
        return self._rows(count)

    def _rows(self, count: int) -> Rows:
        if not count:
            return self._nothing
        found = self._library.llama_get_logits(self._pointer)
        if not found:
            raise log.error("give the logits that it computed")
        key = (ctypes.addressof(found.contents), count)
        if self._view is None or self._view[0] != key:
            self._view = (key, _array(found, (count, self._model.vocab)))
        return self._view[1]

    def clear(self) -> None:
        """Forget all sequences."""
        self._library.llama_memory_clear(self._memory, False)

    def copy(self, source: int, target: int) -> None:
        """Make the sequence in `target` begin as that in `source` does now."""
        self._library.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def forget(self, place: int) -> None:
        """Forget the sequence in `place`."""
        self._library.llama_memory_seq_rm(self._memory, place, -1, -1)

    def threads(self) -> tuple[int, int]:
        """Threads for one token at a time, and for more."""
        single = self._library.llama_n_threads(self._pointer)
        return single, self._library.llama_n_threads_batch(self._pointer)

    def close(self) -> None:
        """Free the cache."""
        self._free()


def _nothing(vocab: int) -> Rows:
    import numpy as np

    return np.empty((0, vocab), dtype=np.float32)


def _array(found: Any, shape: tuple[int, int]) -> Rows:
    import numpy as np

    return np.ctypeslib.as_array(found, shape)


def _context_params(settings: Settings, room: Room) -> Any:
    import llama_cpp

    cells = -(-room.cells // CELL_STEP) * CELL_STEP
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = cells if room.shared else cells * room.places
    params.n_seq_max = room.places
    params.kv_unified = room.shared
    params.n_batch, params.n_ubatch = settings.batch, settings.ubatch
    params.n_outputs_max = min(room.outputs, settings.batch)
    params.n_threads = params.n_threads_batch = settings.threads
    # Asked for as `enabled` it would be taken without a look at whether the device can.
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        if settings.flash_attention
        else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.type_k = params.type_v = settings.kv_type
    params.no_perf = True
    return params


class _Tokens:
    """The arrays of a `llama_batch`, held as numpy arrays: filled by slices, never copied."""

    def __init__(self, size: int, places: int) -> None:
        import llama_cpp
        import numpy as np

        self._ids = np.zeros(size, dtype=np.int32)
        self._positions = np.zeros(size, dtype=np.int32)
        self._counts = np.ones(size, dtype=np.int32)
        self._places = np.zeros((size, places), dtype=np.int32)
        self._wanted = np.zeros(size, dtype=np.int8)
        self._numbers = np.arange(size, dtype=np.int32)
        row = self._places.strides[0]
        first = self._places.ctypes.data
        self._addresses = np.arange(first, first + size * row, row, dtype=np.uintp)
        self.struct = llama_cpp.llama_batch(
            n_tokens=0,
            token=_pointer(self._ids, ctypes.c_int32),
            embd=None,
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(self._addresses, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

    def fill(self, pieces: Sequence[Piece]) -> int:
        """Write the pieces one after the other; the number of rows that are wanted."""
        end = rows = 0
        for piece in pieces:
            begin, end = end, end + len(piece.ids)
            if len(piece.ids) == len(piece.places) == 1:  # a slice would take longer
                self._ids[begin], self._positions[begin] = piece.ids[0], piece.start
                self._counts[begin], self._places[begin, 0] = 1, piece.places[0]
                self._wanted[begin] = piece.rows
            else:
                self._write(piece, begin, end)
            rows += piece.rows
        self.struct.n_tokens = end
        return rows

    def _write(self, piece: Piece, begin: int, end: int) -> None:
        self._ids[begin:end] = piece.ids
        self._positions[begin:end] = self._numbers[: end - begin] + piece.start
        self._counts[begin:end] = len(piece.places)
        self._places[begin:end, : len(piece.places)] = piece.places
        self._wanted[begin:end] = 0
        self._wanted[end - piece.rows : end] = 1


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
