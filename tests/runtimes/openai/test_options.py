"""Options and plan of the runtime `openai`: addresses, keys, baselines, prices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec, config
from qgrid.codec import InvalidValue
from qgrid.files import HashCache
from qgrid.planning import baseline, choices, plan
from qgrid.planning.facts import REMOTE, Facts
from qgrid.runtimes import openai
from qgrid.types import Cell, PlannedCell, Price

URL = "http://localhost:1/v1"
Plan = Callable[..., list[PlannedCell]]


@pytest.fixture
def planned(compose: config.Compose, tmp_path: Path) -> Plan:
    facts = Facts(HashCache(tmp_path / "hashes.json"))

    def build(*overrides: str) -> list[PlannedCell]:
        reader = choices.Reader()
        lines = ["runtime=openai", *overrides]
        grid = config.expand(compose, config.parse(lines, None))
        return plan.build((reader.choice(values) for values in grid), facts)

    return build


def test_another_method_is_advised_to_be_served(planned: Plan) -> None:
    with pytest.raises(plan.EmptyGrid, match=r"does not load `safetensors-16bit`.*`method=served`"):
        planned(f"runtime.base_url={URL}")


def test_the_address_must_be_given(planned: Plan) -> None:
    with pytest.raises(InvalidValue, match=r"`runtime.base_url` has no value"):
        planned("method=served")


def test_a_key_is_not_taken_for_the_name_of_its_variable(planned: Plan) -> None:
    with pytest.raises(InvalidValue, match=r"`runtime.api_key_env=.*never the key itself"):
        planned("method=served", f"runtime.base_url={URL}", "runtime.api_key_env=sk-abc123def")


def test_a_served_cell_is_its_own_baseline_and_takes_bits_as_stated(planned: Plan) -> None:
    found = planned("method=served", "bits=4,8,16", f"runtime.base_url={URL}")
    assert [(p.cell.bits, p.baseline_cell_id, p.added) for p in found] == [
        (4, None, False),
        (8, None, False),
        (16, None, False),
    ]
    assert all(p.status is None and "as stated" in p.notes[-1] for p in found)
    assert len({p.artifact_id for p in found}) == 3


def test_a_second_server_is_the_baseline(planned: Plan) -> None:
    found = planned(
        "method=served",
        "bits=4,8",
        f"runtime.base_url={URL}",
        "runtime.baseline_url=http://other:2/v1",
        "runtime.price={input: 1, output: 2, source: list, date: 2026-11-01}",
    )
    (base,) = [p for p in found if p.added]
    assert [p.baseline_cell_id for p in found if not p.added] == [base.cell_id] * 2
    own = base.cell.runtime.options
    assert (own["base_url"], own["baseline_url"], base.cell.bits) == ("http://other:2/v1", None, 16)
    assert own["price"] is None  # of the first server
    assert baseline.of(base.cell) == base.cell


def test_a_key_goes_to_its_own_server_only(make: Callable[..., Cell]) -> None:
    one = baseline.of(make(baseline_model="big"))
    assert one.runtime.options["api_key_env"] == "OPENAI_API_KEY"  # the same server
    other = baseline.of(make(baseline_url="http://other:2/v1"))
    assert other.runtime.options["api_key_env"] is None
    named = baseline.of(make(baseline_url="http://other:2/v1", baseline_api_key_env="THEIRS"))
    assert named.runtime.options["api_key_env"] == "THEIRS"


def test_nothing_of_this_machine_describes_or_limits_a_server(planned: Plan) -> None:
    lines = ["method=served", f"runtime.base_url={URL}", "workload.concurrency=[1,100000]"]
    (found,) = planned(*lines)
    assert (found.cell.gpu, found.predicted, found.status) == (REMOTE, {}, None)
    (stated,) = planned(*lines, "gpu=h100")
    assert stated.cell.gpu.name == "h100" and stated.status is None


def test_what_changes_no_number_of_quality_measures_none_again(planned: Plan) -> None:
    base = ["method=served", f"runtime.base_url={URL}"]
    (first,) = planned(*base)
    price = "runtime.price={input: 1, output: 2, source: list, date: 2026-11-01}"
    for line in (price, "runtime.retries=9", "runtime.concurrency=2"):
        (other,) = planned(*base, line)
        assert other.quality_id == first.quality_id
        assert other.cell_id != first.cell_id
    for line in ("runtime.model=x", "runtime.prompts=text", "runtime.top_logprobs=5"):
        assert planned(*base, line)[0].quality_id != first.quality_id


def test_the_key_is_in_no_plan(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-0123456789abcdef0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    (found,) = planned("method=served", f"runtime.base_url={URL}")
    assert key not in codec.dumps(found)
    assert openai.options_of(found.cell).key() == key
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert openai.options_of(found.cell).key() is None


def test_a_password_in_an_address_is_refused(planned: Plan) -> None:
    with pytest.raises(InvalidValue, match="holds a secret"):
        planned("method=served", "runtime.base_url='http://me:hunter2secret@host/v1'")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_url": "localhost:8000"}, "`runtime.base_url` is no http or https address"),
        ({"base_url": "http://me@host/v1"}, "holds a user name or password"),
        ({"base_url": "https://host/v1?api-version=1"}, "has a part after"),
        ({"base_url": "http://[::1/v1"}, "`runtime.base_url` is no http or https address"),
        ({"base_url": "http://host:99999/v1"}, "`runtime.base_url` is no http or https address"),
        ({"baseline_url": "ftp://host"}, "`runtime.baseline_url` is no http"),
        ({"logprobs": "echo", "prompts": "text"}, "use `runtime.prompts=auto`"),
    ],
)
def test_options_that_cannot_be(
    make: Callable[..., Cell], changes: dict[str, Any], said: str
) -> None:
    assert said in str(openai.refusal(make(**changes)))
    assert openai.refusal(make()) is None


def test_unknown_keys_of_a_price_are_refused(planned: Plan) -> None:
    line = "runtime.price={input: 1, output: 2, source: list, date: x, currency: EUR}"
    with pytest.raises(InvalidValue, match="currency"):
        planned("method=served", f"runtime.base_url={URL}", line)


def test_the_price_of_output_includes_its_prompts(make: Callable[..., Cell]) -> None:
    """By hand: 1000 prompts and 250 outputs at 0.15 and 0.60 are 0.0003 USD for 250 tokens."""
    asked = dataclasses.asdict(Price(0.15, 0.60, "list", "2026-11-01"))
    cell = make(price=asked)
    load = dataclasses.replace(cell.workload, prompt_tokens=1000, output_tokens=250)
    found = openai.price(dataclasses.replace(cell, workload=load))
    assert found is not None
    assert found.value == pytest.approx((1000 * 0.15 + 250 * 0.60) / 250)
    assert found.value == pytest.approx(1.2)
    assert openai.price(make()) is None
