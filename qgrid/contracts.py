"""What a method and a runtime must offer: token ids in; ids, log-probabilities and times out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from qgrid.types import Cell, Check, MethodSupport, RuntimeSupport


@dataclass(frozen=True)
class Built:
    """What `quantize` reports about the checkpoint it wrote.

    `reference` holds fp32 logits `(tokens, vocab)` of `probe` from the quantized model in memory,
    taken after saving, for the check that a reload computes the same. `module_methods` names what
    really quantized each linear layer where the library knows (a fallback shows there). `checks`
    are the method's own verdicts, kept in the manifest; a failed fatal one is a `bad_artifact`.
    """

    probe: Sequence[int] = ()
    reference: torch.Tensor | None = None
    module_methods: Mapping[str, str] | None = None
    calibration: Mapping[str, Any] | None = None  # source, sha256, samples, length, seed
    checks: Sequence[Check] = ()


class MethodModule(Protocol):
    """A file of `qgrid/methods/` (or an entry point of the group `qgrid.methods`).

    A method whose library can give single layers a width of their own has an option `keep`, see
    `qgrid.weights.widths`. It may also offer, all without torch:

    * `support(options) -> MethodSupport`: what these options change of `SUPPORTS`, such as format
      and packages;
    * `option_bits(options) -> int | None`: the width that an option implies;
    * `resolved(bits, options) -> Mapping`: the options with what `bits` decides filled in;
    * `calibrates(options) -> bool`: whether these options need the calibration text;
    * `identity(options, hashes) -> Mapping`: content of the files that options name, for the id;
    * `refusal(cell) -> str | None`: why this model cannot be stored so (`unsupported`);
    * `mismatch(cell) -> str | None`: what would be stored instead of what is asked (`invalid`);
    * `stored_bits(bits, options, rows, columns)`: the exact size, or `(lowest, highest)`, that the
      check `bits` holds every layer against; the plan takes that of a large layer;
    * `bits_per_weight(bits, options) -> float`: the planned size of all weights, where embedding
      and head shrink as well;
    * `checks(folder, cell) -> Sequence[Check]`: own verdicts about stored files, cheap enough for
      every use of them;
    * `load(folder, arguments) -> model`: the torch model in a folder that transformers does not
      read itself; `arguments` are those of `from_pretrained` (this hook alone may import torch);
    * `UNQUANTIZED`: the options of its 16-bit form, if a runtime names it as its `baseline`.
    """

    SUPPORTS: MethodSupport
    Options: type  # frozen dataclass of the method's own options; the YAML gives the values

    def quantize(self, cell: Cell, source: Path, out: Path) -> Built:
        """Write a loadable checkpoint (weights, config, tokenizer) of `source` into `out`."""


@dataclass(frozen=True)
class Scores:
    """Natural log-probabilities `(rows, vocab)`, fp32.

    Row `r` is the distribution of token `start + r` of sequence number `sequence`.
    """

    sequence: int
    start: int
    logprobs: torch.Tensor


@dataclass(frozen=True)
class TopScores:
    """Natural log-probabilities of the likeliest tokens only, `(rows, k)` of the tokens `ids`.

    Likeliest first. `chosen` `(rows,)` is that of the token that stands there, which need not be
    among them. `k` is 0 where the server does not tell the others apart. `error` says why there
    are no rows: a server gave no answer.
    """

    sequence: int
    start: int
    ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float64]
    chosen: npt.NDArray[np.float64]
    error: str | None = None


class NoLogprobs(RuntimeError):
    """The engine gives no log-probabilities of a text: what needs them is left out."""


@dataclass(frozen=True)
class Generation:
    """New token ids of one request and the seconds from request to each of them.

    `error` says why there are none: a server gave no answer.
    """

    ids: tuple[int, ...]
    seconds: tuple[float, ...]
    error: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose. `weights` counts inner tensors as they are held while computing.

    `peak_bytes` is for an engine whose memory the stage cannot see itself: on a GPU without torch,
    or in another process. The rest is for engines that set a KV pool aside, which makes their peak
    a setting and not a need: the pool, the highest memory of activations, all that was reserved,
    and how many requests of the cell's context the pool holds at once.
    """

    weights_bytes: int
    kv_bytes_per_token: int
    peak_bytes: int | None = None
    kv_pool_bytes: int | None = None
    activation_peak_bytes: int | None = None
    reserved_bytes: int | None = None
    max_concurrency: float | None = None


class InvalidEngine(RuntimeError):
    """The engine that came up is not the one that was asked for: the cell is `invalid`."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server: where requests go.

    `base_url` ends before `/completions`. `extra` goes into every request for text, such as
    `{"ignore_eos": True}`. `metrics` is the URL of the server's own figures in Prometheus' format.
    `own`: the runtime started the server for this cell alone, below this process: a request of
    another length than asked for makes the cell `invalid`, and its processor time is the cell's.
    """

    base_url: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = field(default=None, repr=False)
    metrics: str | None = None
    own: bool = False


class Loaded(Protocol):
    """What an engine and a server tell of the model that they hold."""

    def memory(self) -> Memory | None:
        """Bytes held while computing; None where they cannot be known."""

    def kernels(self) -> Mapping[str, int]:
        """Class names of the linear layers that compute, with counts."""

    def observed(self) -> Mapping[str, Any]:
        """Device, stored and computed dtypes, KV dtype, attention implementation, threads.

        Also, where the runtime knows: `kernel`, the short name of what multiplies the quantized
        layers; `linear_kernels`, a list of `{modules, method, scheme, kernel, dtype}`; and
        `slow_kernel`, one sentence where a faster one exists for this device.
        """

    def checks(self) -> Sequence[Check]:
        """What was asked for against what came up; a failed fatal one is `invalid`."""

    def close(self) -> None:
        """Free what is held."""


class Server(Loaded, Protocol):
    """A model behind an endpoint, for the timing of requests that come over HTTP."""

    endpoint: Endpoint

    def prompt(self, ids: Sequence[int]) -> list[int] | str:
        """How a prompt goes into a request: token ids, or text that encodes to about as many."""


class Engine(Loaded, Protocol):
    """A loaded model. No metric arithmetic happens inside.

    One that knows only the likeliest tokens has `truncated = True`: its rows are `TopScores`. It
    may offer `chosen(sequences, keep) -> Iterator[TopScores]`, as `score`, for when the lists are
    not wanted (k = 0). `positions`, where it has that, is the longest sequence that it takes.
    `kv_rows() -> tuple[int, int] | None`, where it has that: distributions computed so far, also
    once it is closed, and those of them with a token before that its KV cache holds quantized.
    """

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int] = ()
    ) -> Iterator[Scores] | Iterator[TopScores]:
        """Distributions of the last `keep[i]` tokens of every sequence, in order of sequences.

        A long sequence arrives in several chunks of at most 512 rows. `prefix` is prefilled once
        and precedes every sequence. `keep[i]` is at most `len(sequences[i])`, less one without a
        prefix (the first token has no context).

        Raises:
            NoLogprobs: the engine has none to give.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] = ()
    ) -> list[Generation]:
        """Greedy continuations of all prompts as one batch; `stop` ids end a request."""


class RuntimeModule(Protocol):
    """A file of `qgrid/runtimes/` (or an entry point of the group `qgrid.runtimes`).

    It may also offer, without loading anything: `refusal(cell) -> str | None`, which options
    cannot go together (`unsupported`), and `kv_bits(cell) -> float`, bits of a stored key or value.
    A runtime that serves requests over HTTP offers `serve(artifact, cell, dtype) -> Server`, which
    the speed stage then times instead of an engine.

    `baseline_options(options) -> options | None`: the options that a cell's baseline has; None: the
    cell is its own baseline. `settled_options(options, kv_cache) -> options`: with those that
    nothing looks at beside this cache as they are by default. `quality_options(options)`: those
    that can change a number of quality; the others enter only the cell's id. `price(cell) ->
    Measurement | None`: what the workload's tokens cost by a price list, with no GPU to rent.

    `more_packages(cell)`: distributions beside `LOADS.packages` that compute in this cell.

    `deterministic(cell) -> bool`: whether the same quality request gives the same numbers again, to
    the last digit (`reproduce` then compares item by item). Without it a remote runtime is not.
    """

    LOADS: RuntimeSupport
    Options: type

    def load(self, artifact: Path, cell: Cell, dtype: str) -> Engine:
        """Load the checkpoint in `artifact`, computing in `dtype`."""


class Unsupported(ValueError):
    """A combination that cannot be made, found before any work: the cell becomes `unsupported`."""


class Unreachable(ConnectionError):
    """Something of the network cannot be had at this moment: the cell `crashed`, and runs again."""
