"""The runtime `openai` and the method `served` without a server: plan, artifact, answers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgrid import artifacts, assembly, baseline, choices, codec, config, environment, plan
from qgrid.codec import InvalidValue
from qgrid.facts import REMOTE, Facts
from qgrid.files import HashCache
from qgrid.pipeline import Outcome
from qgrid.runtimes import _openai_rows as rows
from qgrid.runtimes import openai
from qgrid.serving.failures import RequestFailed
from qgrid.types import Cell, Gpu, PlannedCell, Price
from tests.servers import cells

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


@pytest.fixture
def make(make_cell: Callable[..., Cell]) -> Callable[..., Cell]:
    return lambda base_url=URL, **more: cells.cell(make_cell, base_url, more)


def test_another_method_is_advised_to_be_served(planned: Plan) -> None:
    with pytest.raises(plan.EmptyGrid, match=r"does not load `safetensors-16bit`.*`method=served`"):
        planned(f"runtime.base_url={URL}")


def test_the_address_must_be_given(planned: Plan) -> None:
    with pytest.raises(InvalidValue, match=r"`runtime.base_url` has no value"):
        planned("method=served")


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


def built(make: Callable[..., Cell], tiny_random: Path, tmp_path: Path) -> tuple[Any, Any]:
    cell = dataclasses.replace(
        make(), bits=4, model=dataclasses.replace(make().model, id=str(tiny_random))
    )
    folder = tmp_path / "artifacts" / "artifact"
    job = cells.job("artifact", cell, folder, tmp_path / "out")
    return job, artifacts.build(dataclasses.replace(job, artifact=str(folder)))


def test_an_artifact_without_weights_claims_none(
    make: Callable[..., Cell], tiny_random: Path, tmp_path: Path
) -> None:
    job, result = built(make, tiny_random, tmp_path)
    assert result.failure is None
    assert result.measurements == ()
    assert {check.name for check in result.checks} == {"files", "tokenizer"}
    folder = Path(job.artifact)
    assert not list(folder.glob("*.safetensors"))
    manifest = artifacts.load_manifest(folder)
    assert (manifest.format, manifest.bits_per_weight, manifest.num_parameters) == (
        "served",
        None,
        None,
    )
    checks = artifacts.verify(folder, job.planned, HashCache(tmp_path / "hashes.json"), full=True)
    assert [(c.name, c.ok) for c in checks] == [
        ("files", True),
        ("manifest", True),
        ("tokenizer", True),
    ]
    outcome = Outcome(results={"artifact": result}, manifest=manifest)
    here = Gpu("this cpu", "cpu", "", None, 8.0, None, 1)
    planned = dataclasses.replace(
        job.planned, cell=dataclasses.replace(job.planned.cell, gpu=REMOTE)
    )
    record = assembly.measured(planned, outcome, tmp_path, here, environment.momentary())
    assert record.measurements == ()
    assert record.artifact["size_bytes"] is None
    assert record.observed["device"]["name"] == "remote"


def test_of_a_hub_model_no_weights_are_fetched(
    make: Callable[..., Cell],
    tiny_random: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[str] = []

    def hub(repository: str, **more: Any) -> str:
        if more["local_files_only"]:
            raise LocalEntryNotFoundError("not in the cache")
        for path in tiny_random.iterdir():
            if any(path.match(pattern) for pattern in more["allow_patterns"]):
                asked.append(path.name)
                shutil.copyfile(path, Path(more["local_dir"]) / path.name)
        return str(more["local_dir"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    cell = make()
    far = dataclasses.replace(cell, model=dataclasses.replace(cell.model, id="org/far"))
    folder = tmp_path / "artifacts" / "artifact"
    job = cells.job("artifact", far, folder, tmp_path / "out")
    result = artifacts.build(dataclasses.replace(job, artifact=str(folder)))
    assert result.failure is None
    assert "tokenizer.json" in asked and "config.json" in asked
    assert not [name for name in asked if "safetensors" in name]
    checks = artifacts.verify(folder, job.planned, HashCache(tmp_path / "hashes.json"))
    assert all(check.ok for check in checks)


def test_an_artifact_without_weights_is_checked_all_the_same(
    make: Callable[..., Cell], tiny_random: Path, tmp_path: Path
) -> None:
    job, _ = built(make, tiny_random, tmp_path)
    folder = Path(job.artifact)

    def failed(planned: PlannedCell = job.planned) -> set[str]:
        cache = HashCache(tmp_path / "hashes.json")
        found = artifacts.verify(folder, planned, cache, full=True)
        return {check.name for check in found if not check.ok}

    assert failed() == set()
    other = dataclasses.replace(job.planned, cell=dataclasses.replace(job.planned.cell, bits=8))
    assert failed(other) == {"manifest"}
    (folder / "model.safetensors").write_bytes(b"weights")
    assert failed() == {"files"}
    (folder / "model.safetensors").unlink()
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"]["red"] = 3
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert failed() == {"files", "tokenizer"}


def answer(logprobs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "x", "logprobs": logprobs, **more}]}


def echo(ids: list[int], top: list[dict[str, float] | None] | None = None) -> dict[str, Any]:
    values: list[float | None] = [None, *(-0.5 * place for place in range(1, len(ids)))]
    names = [f"token_id:{token}" for token in ids]
    return answer({"tokens": names, "token_logprobs": values, "top_logprobs": top})


def test_rows_are_the_last_of_the_prompt_likeliest_first() -> None:
    top: list[dict[str, float] | None] = [
        None,
        {"token_id:7": -0.5, "token_id:1": -0.1, "token_id:2": -0.2},
        {"token_id:9": -1.0, "token_id:4": -0.3},
    ]
    found = rows.echoed(echo([5, 7, 9], top), [5, 7, 9], keep=2)
    assert found.chosen.tolist() == [-0.5, -1.0]
    assert found.ids.tolist() == [[1, 2], [4, 9]]  # as many as every row has
    assert found.logprobs.tolist() == [[-0.1, -0.2], [-0.3, -1.0]]
    longer = echo([5, 7, 9, 3], [*top, {"token_id:3": 0.0}])  # one new token beside the echo
    assert rows.echoed(longer, [5, 7, 9], keep=2).chosen.tolist() == [-0.5, -1.0]


def test_tokens_named_by_text_give_no_list() -> None:
    top: list[dict[str, float] | None] = [None, {" a": -0.5, "\ufffd": -0.1}]
    found = rows.echoed(echo([5, 7], top), [5, 7], keep=1)
    assert found.chosen.tolist() == [-0.5]
    assert found.ids.shape == (1, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"choices": []},
        {"choices": [1]},
        answer(None),
        answer({"token_logprobs": [None, -1.0]}),
        answer({"token_logprobs": [None, -1.0, None]}),
        answer({"token_logprobs": [None, -1.0, "-1"]}),
        answer({"token_logprobs": [None, -1.0, float("nan")]}),
        answer({"token_logprobs": [None, -1.0, -1.0, -1.0, -1.0]}),
        echo([5, 7, 8]),
        {**echo([5, 7, 9]), "usage": {"prompt_tokens": 4}},
    ],
)
def test_an_answer_about_something_else_is_garbage(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestFailed) as caught:
        rows.echoed(wrong, [5, 7, 9], keep=2)
    assert caught.value.kind == "garbage" and caught.value.retryable


def test_generated_ids_come_by_name_or_from_the_text() -> None:
    def encode(text: str) -> list[int]:
        return [ord(each) for each in text]

    assert rows.generated(answer(token_ids=[1, 2]), encode) == (1, 2)
    content = {"content": [{"id": 4, "token": "a"}, {"id": 5, "token": "b"}]}
    assert rows.generated(answer(content), encode) == (4, 5)
    assert rows.generated(answer(), encode) == (ord("x"),)
    with pytest.raises(RequestFailed, match="no text"):
        rows.generated({"choices": [{"text": None}]}, encode)


def test_rows_without_lists_keep_what_was_chosen() -> None:
    found = rows.without_lists(rows.Row(np.ones((2, 3), np.int64), np.ones((2, 3)), np.ones(2)))
    assert (found.ids.shape, found.logprobs.shape, found.chosen.tolist()) == (
        (2, 0),
        (2, 0),
        [1, 1],
    )
