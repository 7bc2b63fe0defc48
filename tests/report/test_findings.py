from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from qgrid import registry, report
from qgrid.report import compare, findings
from qgrid.types import Check, Measurement

if TYPE_CHECKING:
    from tests.report.conftest import Sweep

Number = Callable[..., Measurement]
Change = Callable[[str, float, float], Measurement]


def about(sweep: Sweep, words: str) -> list[str]:
    return [each for each in report.surprises(sweep.planned, sweep.records) if words in each]


def test_a_fallen_slice_behind_a_harmless_mean(sweep: Sweep, make_change: Change) -> None:
    found = about(sweep.measured("gptq", 8, make_change("arithmetic", -0.05, 0.02)), "gptq at 8")
    assert found[0] == (
        "gptq at 8 bits: a slice fell: `arithmetic` -5.0 points (-7.0 to -3.0), although the mean"
        " over 8 slices changed by only -0.7 points."
    )


def test_no_slice_falls_within_noise(sweep: Sweep) -> None:
    assert not about(sweep, "awq at 8 bits: a slice fell")
    assert not about(sweep, "int8 at 8 bits")


def test_holm_silences_what_many_slices_explain(sweep: Sweep, make_change: Change) -> None:
    barely = make_change("arithmetic", -0.021, 0.02)  # p = 0.04 alone, 0.32 among eight
    assert not about(sweep.measured("gptq", 8, barely), "slice fell")[1:]
    assert compare.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "c": 0.06, "b": 0.06}


def test_exact_test_of_few_flips_counts(
    sweep: Sweep, make_change: Change, make_number: Number
) -> None:
    fell = sweep.measured("gptq", 8, make_change("arithmetic", -0.05, 0.02))
    assert about(fell, "gptq at 8 bits: a slice fell")
    doubtful = fell.measured("gptq", 8, make_number("mcnemar_p", 0.06, "arithmetic"))
    assert not about(doubtful, "gptq at 8 bits: a slice fell")


def test_an_implausible_gain(sweep: Sweep, make_change: Change, make_number: Number) -> None:
    assert about(sweep.measured("awq", 4, make_change("code", 0.06, 0.02)), "implausible")
    assert not about(sweep.measured("awq", 4, make_change("code", 0.025, 0.02)), "implausible")
    better = make_number("ln_ppl_ratio", -0.1, low=-0.12, high=-0.08)
    assert about(sweep.measured("awq", 4, better), "perplexity is better")


def test_a_noise_floor_that_is_no_floor(sweep: Sweep, make_number: Number) -> None:
    assert about(sweep.measured("none", 16, make_number("kld_floor", 9.9)), "bfloat16 alone makes")
    assert not about(sweep, "alone makes")


def test_an_artifact_larger_than_asked(sweep: Sweep, make_number: Number) -> None:
    wide = sweep.measured("rtn", 4, make_number("linear_bits_per_weight", 8.1))
    assert about(wide, "rtn at 4 bits: the linears take 8.10 bits per weight")
    big = sweep.measured("rtn", 4, make_number("size_on_disk_bytes", 9.0e6))
    assert about(big, "no less than the baseline's")
    assert about(big, "were planned")
    assert not about(sweep, "takes")


def test_divergence_that_grows_with_bits(sweep: Sweep, make_number: Number) -> None:
    far = sweep.measured("awq", 8, make_number("kld_mean", 0.05, low=0.048, high=0.052))
    assert about(far, "larger than at 4 bits") == [
        "awq at 8 bits: its KL divergence (0.0500 nats) is larger than at 4 bits (0.0163)."
    ]
    vague = sweep.measured("awq", 8, make_number("kld_mean", 0.05, low=0.001, high=0.1))
    assert not about(vague, "larger than at 4 bits")


def test_an_unstable_timing(sweep: Sweep, make_number: Number) -> None:
    unstable = sweep.measured("nf4", 4, make_number("timing_cv", 0.12, "concurrency=4"))
    assert about(unstable, "nf4 at 4 bits: the timing is unstable")[0].endswith("12 % at batch 4.")


def test_unstable_timings_of_several_cells_are_one_sentence(
    sweep: Sweep, make_number: Number
) -> None:
    one = sweep.measured("nf4", 4, make_number("timing_cv", 0.12, "concurrency=4"))
    both = one.measured("gptq", 4, make_number("timing_cv", 0.31, "concurrency=4"))
    assert about(both, "timing is unstable") == [
        "nf4 at 4 bits, gptq at 4 bits: the timing is unstable, its repeats vary by "
        "12 to 31 % at batch 4."
    ]


def test_first_tokens_that_were_read_too_late(sweep: Sweep, make_number: Number) -> None:
    merged = sweep.measured("nf4", 4, make_number("merged_first_tokens", 0.75, "concurrency=4"))
    assert "75 % at batch 4" in about(merged, "nf4 at 4 bits: first tokens were read together")[0]
    few = sweep.measured("nf4", 4, make_number("merged_first_tokens", 0.05, "concurrency=4"))
    assert not about(few, "first tokens")


def test_a_fallback_in_the_histogram(sweep: Sweep) -> None:
    artifact = {"modules": {"gptq pack-quantized 4": 27, "rtn pack-quantized 4": 1}}
    assert about(sweep.changed("gptq", 4, artifact=artifact), "not all 28 linears") == [
        "gptq at 4 bits: not all 28 linears were made by `gptq`: 1 by `rtn`."
    ]


def test_an_unpacking_runtime_is_said_once(sweep: Sweep) -> None:
    assert len(about(sweep, "unpacks")) == 1
    assert "28 x pack-quantized, computes in 28 x bfloat16" in about(sweep, "unpacks")[0]


def test_a_failed_check_that_is_not_fatal(sweep: Sweep) -> None:
    check = Check("decode_below_bandwidth", False, "at most 90 tok/s", "118 tok/s", fatal=False)
    assert about(sweep.changed("none", 16, checks=(check,)), "expected at most 90 tok/s")


def test_uninformative_slices_of_the_baseline(sweep: Sweep, make_number: Number) -> None:
    mastered = sweep.measured("none", 16, make_number("accuracy", 0.99, "code", low=0.97, high=1.0))
    assert about(mastered, "`code` is uninformative")
    hopeless = sweep.measured("none", 16, make_number("accuracy", 0.0, "code", low=0.0, high=0.01))
    assert about(hopeless, "from guessing (0.0%)")
    assert not about(sweep, "uninformative")


def test_chance_comes_from_the_number_of_choices(sweep: Sweep, make_number: Number) -> None:
    cell = sweep.planned[0].cell
    path = "package:qgrid.demo/slices/retrieval.jsonl"
    asked = replace(cell.slices.items["retrieval"], path=path, scoring="choice")
    slices = replace(cell.slices, items={**cell.slices.items, "retrieval": asked})
    planned = [replace(sweep.planned[0], cell=replace(cell, slices=slices)), *sweep.planned[1:]]
    guessed = make_number("accuracy", 0.26, "retrieval", low=0.22, high=0.30)
    records = sweep.measured("none", 16, guessed).records
    assert any("from guessing (25.0%)" in each for each in report.surprises(planned, records))


def test_module_methods_of_a_list() -> None:
    modules = {"a": {"method": "gptq"}, "b": {"method": "gptq"}, "c": {"method": "rtn"}}
    assert findings.module_methods({"modules": modules}) == {"gptq": 2, "rtn": 1}


def test_ratio_needs_both_intervals(make_number: Number) -> None:
    value = make_number("decode_throughput", 150.0, low=147.0, high=153.0)
    base = make_number("decode_throughput", 100.0, low=98.0, high=103.0)
    ratio = compare.ratio(value, base)
    assert ratio is not None
    assert ratio.is_claimed
    assert ratio.value == pytest.approx(1.5)
    assert 147 / 103 < ratio.low < 1.5 < ratio.high < 153 / 98
    assert compare.ratio(value, replace(base, low=None)) is None
    assert compare.ratio(None, base) is None


def with_texts(sweep: Sweep, **texts: tuple[float, dict[str, float]]) -> Sweep:
    """`gptq` at 4 bits once more for each text, with a KL divergence and drops of some slices."""
    found = sweep
    old = next(each for each in sweep.planned if each.cell_id == "cell-gptq-4")
    assert old.cell.calibration is not None
    for name, (kld, drops) in texts.items():
        asked = replace(old.cell, calibration=replace(old.cell.calibration, name=name))
        planned = replace(old, cell_id=f"cell-{name}", cell=asked)
        told = {(m.metric, m.slice): m for m in sweep.record("gptq", 4).measurements}
        mean = told["kld_mean", None]
        told["kld_mean", None] = replace(mean, value=kld, low=0.9 * kld, high=1.1 * kld)
        for part, drop in drops.items():
            change = told["accuracy_delta", part]
            told["accuracy_delta", part] = replace(
                change, value=-drop, low=-drop - 0.02, high=-drop + 0.02, stderr=None
            )
        record = replace(
            sweep.record("gptq", 4),
            cell_id=planned.cell_id,
            cell=asked,
            measurements=tuple(told.values()),
        )
        found = replace(found, planned=[*found.planned, planned], records=[*found.records, record])
    return found


def test_a_wrong_calibration_text_is_named(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    hard = ("structured", "arithmetic", "code", "long_context")
    texts = with_texts(
        sweep,
        noise=(0.3, {"arithmetic": 0.3}),
        verses=(0.0145, {"arithmetic": 0.2, "code": 0.05}),  # near where prose is measured
        halves=(0.0143, dict.fromkeys(hard, 0.07)),  # no slice tells alone, all of them do
        near=(0.0142, {}),
    )
    said = about(texts, "the calibration text")
    assert said == [
        "gptq at 4 bits (noise): the calibration text `noise` is worse than `tiny` at the same "
        "method and bits: its KL divergence is 0.3000 nats against 0.0141; slices that fell "
        "further: `arithmetic` -26.6 points.",
        "gptq at 4 bits (verses): the calibration text `verses` is worse than `tiny` at the same "
        "method and bits: slices that fell further: `arithmetic` -16.6 points; KL divergence does "
        "not tell (0.0145 nats against 0.0141).",
        "gptq at 4 bits (halves): the calibration text `halves` is worse than `tiny` at the same "
        "method and bits: its slices lost 1.8 points more on the mean (0.8 to 2.8), most of all "
        "`structured` -3.6 points; KL divergence does not tell (0.0143 nats against 0.0141).",
    ]
    assert about(texts, "looks at no calibration text") == [
        "gptq at 4 bits (noise): `rtn`, which looks at no calibration text, is nearer to the "
        "baseline at the same bits: KL divergence 0.0304 nats against 0.3000."
    ]
    assert not about(sweep, "calibration text")
    foreign = replace(registry.method("rtn").SUPPORTS, from_base=False)  # by whatever text
    monkeypatch.setattr(registry, "support", lambda _: foreign)
    assert not about(texts, "looks at no calibration text")
