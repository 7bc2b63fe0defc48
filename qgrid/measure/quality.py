"""The quality stage: perplexity, KL divergence and slices of one cell."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import files, models
from qgrid.contracts import NoLogprobs
from qgrid.measure import answers, kv_rows, prose, row_cache, slices, truncated
from qgrid.measure.encoding import Encoder, TooLong
from qgrid.measure.loading import Phases, fits_beside, is_baseline, load
from qgrid.measure.prose import Tokens, Windows
from qgrid.planning import baseline
from qgrid.types import Measurement, StageResult

if TYPE_CHECKING:
    from qgrid.contracts import Engine
    from qgrid.types import Job

_KV_ROWS = "kv_rows_quantized"  # in `observed`: see `measure.kv_rows`


def measure(job: Job) -> StageResult:
    """Measure the job's artifact; writes `items.jsonl` into `job.out`.

    Raises:
        InvalidEngine: the engine is not what was asked for, or computes NaN.
    """
    cell = job.planned.cell
    phases = Phases()
    with phases("load"):
        encoder = Encoder(Path(job.artifact), cell.model.trust_remote_code)
        engine = load(job.artifact, cell, cell.runtime.dtype)
        encoder.limit_positions(getattr(engine, "positions", None))
    with phases("slices"):
        results, left_out, kv_shares = _answered(job, engine, encoder)
    checks = tuple(engine.checks())
    measurements = [
        measurement
        for name in cell.slices.items
        if name not in left_out
        for measurement in answers.summary(name, [each for each in results if each.slice == name])
    ]
    observed: dict[str, Any] = {**engine.observed(), "bos": encoder.bos, "left_out": left_out}
    with phases("prose"):
        try:
            found, more = _prose(job, engine, encoder)
            kv_shares |= more.get(_KV_ROWS, {})
        except NoLogprobs as error:
            found, more = [], {"left_out": left_out | {"prose": str(error)}}
            engine.close()
    _write_items(Path(job.out), results)
    return StageResult(
        "quality",
        measurements=(*found, *measurements),
        checks=(*checks, *kv_rows.checks(kv_shares)),
        observed=observed | more | ({_KV_ROWS: kv_shares} if kv_shares else {}),
        seconds=phases.seconds,
    )


def _answered(
    job: Job, engine: Engine, encoder: Encoder
) -> tuple[list[answers.Answered], dict[str, str], dict[str, float]]:
    """Results of all items, why a slice was left out, and its share of a quantized KV cache.

    The model is too short for it, or the engine gives no log-probabilities to choose by.
    """
    cell = job.planned.cell
    results: list[answers.Answered] = []
    left_out, kv_shares = {}, {}
    for name, wanted in cell.slices.items.items():
        items = slices.load(name, wanted, cell.seed)
        watch = kv_rows.Watch(engine)
        try:
            results += answers.answer(name, wanted, items, engine, encoder)
        except (TooLong, NoLogprobs) as error:
            left_out[name] = str(error)
            continue
        if (share := watch.share()) is not None:
            kv_shares[name] = share
    return results, left_out, kv_shares


def _write_items(out: Path, results: Sequence[answers.Answered]) -> None:
    # As ASCII: a broken model's reply may hold characters that end a line, as U+0085.
    lines = (json.dumps(answers.line(each)) + "\n" for each in results)
    files.write_atomic(out / "items.jsonl", "".join(lines))


def _prose(job: Job, engine: Engine, encoder: Encoder) -> tuple[list[Measurement], dict[str, Any]]:
    """Perplexity, and divergence from the baseline (or the baseline's own noise floor).

    Closes `engine`.
    """
    cell = job.planned.cell
    wanted = cell.slices.prose
    if wanted is None:
        engine.close()
        return [], {}
    encoder.require_positions(cell.context, f"`context={cell.context}`")
    text = models.resource(wanted.path).read_text(encoding="utf-8")
    ids = encoder.prose(text, wanted.tokens)
    windows = prose.cut(ids, cell.context, wanted.protocol, encoder.bos)
    protocol = f"{wanted.protocol}-{cell.context}"
    observed: dict[str, Any] = {"ppl_protocol": protocol, "windows": len(windows)}
    if getattr(engine, "truncated", False):
        return _truncated(job, engine, windows, observed)
    if is_baseline(job):
        return _floor(job, engine, windows), observed
    tokens, pairing = paired_tokens(job, engine, windows)
    found = [prose.perplexity(tokens), *prose.against_baseline(tokens)]
    return found, observed | pairing


def _truncated(
    job: Job, engine: Engine, windows: Windows, observed: dict[str, Any]
) -> tuple[list[Measurement], dict[str, Any]]:
    """As `_prose`, of an engine that tells only the likeliest tokens. Closes `engine`."""
    cell = job.planned.cell
    top = truncated.told(engine, windows)
    observed |= {**engine.observed(), "failed_windows": top.failed}
    engine.close()
    if is_baseline(job):
        return [prose.perplexity(truncated.alone(top))], observed
    assert job.baseline is not None
    reference = load(job.baseline, baseline.of(cell), cell.runtime.dtype)
    try:
        base = truncated.told(reference, windows)
    except NoLogprobs as error:
        observed["left_out_of_baseline"] = {"prose": str(error)}
        return [prose.perplexity(truncated.alone(top))], observed
    finally:
        reference.close()
    observed["failed_windows"] = {**base.failed, **top.failed}  # in no figure
    tokens = truncated.paired(top, base)
    return [prose.perplexity(tokens), *truncated.against_baseline(tokens)], observed


def _floor(job: Job, engine: Engine, windows: Windows) -> list[Measurement]:
    """A baseline's perplexity, and its divergence from itself at another speed dtype.

    Closes `engine`.
    """
    cell = job.planned.cell
    if cell.runtime.speed_dtype == cell.runtime.dtype:
        return [prose.perplexity(_alone(engine, windows))]
    tokens = Tokens.empty(windows)
    if fits_beside(Path(job.artifact), cell, cell.runtime.speed_dtype):
        other = load(job.artifact, cell, cell.runtime.speed_dtype)
        prose.collect(tokens, windows, prose.rows(other, windows), prose.rows(engine, windows))
        other.close()
        engine.close()
        exact = dataclasses.replace(tokens, nll=tokens.base_nll)
    else:
        exact = _alone(engine, windows)
        loads = (
            functools.partial(load, job.artifact, cell, dtype)
            for dtype in (cell.runtime.speed_dtype, cell.runtime.dtype)
        )
        row_cache.collect_by_turns(tokens, windows, *loads)
    return [prose.perplexity(exact), prose.mean_over_windows("kld_floor", tokens.kl)]


def _alone(engine: Engine, windows: Windows) -> Tokens:
    """Log-probabilities of every token, compared with nothing. Closes `engine`."""
    tokens = Tokens.empty(windows)
    prose.collect(tokens, windows, prose.rows(engine, windows), None)
    engine.close()
    return tokens


def paired_tokens(
    job: Job, engine: Engine, windows: Windows, beside: bool | None = None
) -> tuple[Tokens, dict[str, Any]]:
    """Numbers of every token against the baseline, and how the two models were paired.

    `beside` says whether both are held in memory at once; None decides by what is free. Closes
    `engine`.
    """
    cell = job.planned.cell
    assert job.baseline is not None
    folder = Path(job.baseline)
    tokens = Tokens.empty(windows)
    watch = kv_rows.Watch(engine)

    def load_baseline() -> Engine:
        return load(folder, baseline.of(cell), cell.runtime.dtype)

    if beside is None:
        beside = fits_beside(folder, cell, cell.runtime.dtype)
    if beside:
        reference = load_baseline()
        prose.collect(tokens, windows, prose.rows(engine, windows), prose.rows(reference, windows))
        reference.close()
        engine.close()
        return tokens, {"baseline_rows": "computed beside the cell", **_of_prose(watch)}
    engine.close()
    load_cell: Callable[[], Engine] = lambda: watch.add(  # noqa: E731
        load(job.artifact, cell, cell.runtime.dtype)
    )
    floor = row_cache.collect_by_turns(tokens, windows, load_cell, load_baseline)
    told = {"baseline_rows": "cached in float16", "kld_cache_floor": floor}
    return tokens, told | _of_prose(watch)


def _of_prose(watch: kv_rows.Watch) -> dict[str, Any]:
    share = watch.share()
    return {} if share is None else {_KV_ROWS: {"prose": share}}
