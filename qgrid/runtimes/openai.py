"""Any OpenAI-compatible server: what it serves is measured by requests to `base_url`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, NonNegativeInt, PositiveFloat, PositiveInt

from qgrid.metrics import METRICS
from qgrid.types import Measurement, Price, RuntimeSupport

if TYPE_CHECKING:
    from qgrid.runtimes._openai_engine import Remote
    from qgrid.types import Cell

_KV = ("auto16", "fp8", "int8", "int4")  # as stated: a server does not tell

LOADS = RuntimeSupport(
    loads={"cpu": ("served",), "cuda": ("served",)},
    kv_cache={"cpu": _KV, "cuda": _KV},
    packages=("aiohttp",),
    baseline="served",
    remote=True,
)
_COST = "usd_per_million_output_tokens"
_NO_QUALITY = ("api_key_env", "retries", "deadline_seconds", "concurrency", "price")


def _named(value: str) -> str:
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", value):
        raise ValueError("the name of an environment variable, in capitals; never the key itself")
    return value


Variable = Annotated[str, AfterValidator(_named)]


@dataclass(frozen=True)
class Options:
    """Options of this runtime, see `conf/runtime/openai.yaml`."""

    base_url: str
    model: str | None
    api_key_env: Variable | None
    prompts: Literal["auto", "ids", "text"]
    logprobs: Literal["auto", "echo", "none"]
    top_logprobs: NonNegativeInt
    retries: NonNegativeInt
    deadline_seconds: PositiveFloat
    concurrency: PositiveInt
    baseline_url: str | None
    baseline_model: str | None
    baseline_api_key_env: Variable | None
    price: Price | None

    def key(self) -> str | None:
        """The key from the environment; None where there is none."""
        found = None if self.api_key_env is None else os.environ.get(self.api_key_env, "").strip()
        return found or None  # an empty variable holds no key; one from a file ends in a line break


def options_of(cell: Cell) -> Options:
    """The cell's options as this type."""
    values = dict(cell.runtime.options)
    price = values.pop("price")
    return Options(**values, price=None if price is None else Price(**price))


def refusal(cell: Cell) -> str | None:
    """Addresses that are none or hold a secret, and options that contradict each other."""
    options = options_of(cell)
    for key in ("base_url", "baseline_url"):
        url = getattr(options, key)
        if url is not None and (fault := _fault(url)):
            return f"`runtime.{key}` {fault}; give one as http://HOST:PORT/v1"
    if options.logprobs == "echo" and options.prompts == "text":
        return (
            "`runtime.logprobs=echo` scores token ids, which `runtime.prompts=text` does not send; "
            "use `runtime.prompts=auto`"
        )
    return None


def _fault(url: str) -> str | None:
    """What is wrong with an address; the address itself may hold a secret and is not told."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "is no http or https address"
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return "is no http or https address"
    if parts.username is not None or parts.password is not None:
        return "holds a user name or password, which would be written to plan and records"
    if parts.query or parts.fragment:
        return "has a part after `?` or `#`"
    return None


def baseline_options(options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Where the same model has 16 bits; None where nobody named such a place."""
    url, model = options["baseline_url"], options["baseline_model"]
    if url is None and model is None:
        return None
    same = url is None or url == options["base_url"]
    return {
        **options,
        "base_url": options["base_url"] if url is None else url,
        "model": model,
        "api_key_env": options["api_key_env" if same else "baseline_api_key_env"],
        "baseline_url": None,
        "baseline_model": None,
        "baseline_api_key_env": None,
        "price": None,
    }


def quality_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What can change a number of quality: not the price, nor how patient the client is."""
    return {key: value for key, value in options.items() if key not in _NO_QUALITY}


def price(cell: Cell) -> Measurement | None:
    """What a million output tokens cost in the workload's shape, its prompts included."""
    asked = options_of(cell).price
    if asked is None:
        return None
    load_ = cell.workload
    prompts = load_.prompt_tokens / load_.output_tokens * asked.input
    return Measurement(_COST, prompts + asked.output, METRICS[_COST].unit)


def load(artifact: Path, cell: Cell, dtype: str) -> Remote:
    """Ask the server what it is and what it takes; `dtype` is the server's own affair.

    Raises:
        InvalidEngine: it serves another model, or with another tokenizer.
        Unsupported: it cannot be asked in the way that the options want.
        ServerLost: it cannot be reached.
    """
    from qgrid.runtimes._openai_engine import opened

    return opened(artifact, cell, options_of(cell))


def serve(artifact: Path, cell: Cell, dtype: str) -> Remote:
    """As `load`: the endpoint itself is what the speed stage times."""
    return load(artifact, cell, dtype)
