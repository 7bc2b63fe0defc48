"""Records: round trip, NaN, unknown schemas, and no secret in any string written."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from qgrid import codec, redact
from qgrid.store import records
from qgrid.types import (
    RECORD_SCHEMA,
    Check,
    Failure,
    Job,
    Measurement,
    PlannedCell,
    Record,
    StageResult,
)
from tests import faults

DOCS = Path(__file__).parents[2] / "docs" / "record.md"
HF = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
WANDB = "0123456789abcdef0123456789abcdef01234567"
COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def planned(tmp_path: Path) -> PlannedCell:
    return faults.planned(faults.cell(tmp_path / "model"))


def record_of(planned: PlannedCell) -> Record:
    return Record(
        schema=RECORD_SCHEMA,
        cell_id=planned.cell_id,
        artifact_id=planned.artifact_id,
        quality_id=planned.quality_id,
        baseline_cell_id=None,
        status="ok",
        cell=planned.cell,
        artifact={"files": {"model.safetensors": "ab" * 32}},
        measurements=(Measurement("ppl", 12.5, "1", stderr=0.1, n=40),),
        checks=(Check("files", True, "3 files", "3 files"),),
        observed={"quality": {"kernels": {"Linear": 14}}},
        environment={"fingerprint": "f00d"},
        timings={"quality.load_seconds": 0.25},
        notes=("a note",),
        error=None,
    )


def test_a_record_reads_back_as_it_was_written(tmp_path: Path, planned: PlannedCell) -> None:
    record = record_of(planned)
    assert records.read(tmp_path, planned.cell_id) is None
    records.write(tmp_path, record)
    assert records.read(tmp_path, planned.cell_id) == record
    assert records.read_all(tmp_path, [planned]) == {planned.cell_id: record}


def test_nan_never_reaches_json(tmp_path: Path, planned: PlannedCell) -> None:
    measurements = (
        Measurement("ppl", math.inf, "1", "prose"),
        Measurement("kld_mean", 0.5, "nats", stderr=math.nan, low=0.4, high=math.inf),
    )
    record = dataclasses.replace(
        record_of(planned), measurements=measurements, observed={"loads": [1.0, math.nan]}
    )
    text = records.write(tmp_path, record).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    read = records.read(tmp_path, planned.cell_id)
    assert read is not None
    assert read.measurements == (Measurement("kld_mean", 0.5, "nats", low=0.4),)
    assert read.observed == {"loads": [1.0, None]}
    assert "`ppl` of prose is inf and is left out" in read.notes


def test_a_stage_result_names_the_numbers_it_lost(tmp_path: Path) -> None:
    result = StageResult("speed", measurements=(Measurement("ttft_ms", math.nan, "ms"),))
    records.save_result(tmp_path / "result.json", result)
    read = records.load_result(tmp_path / "result.json")
    assert read is not None
    assert read.measurements == ()
    assert read.observed["notes"] == ["`ttft_ms` is nan and is left out"]


def test_a_result_that_was_cut_short_is_none(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert records.load_result(path) is None
    path.write_text('{"stage": "speed", "measure')
    assert records.load_result(path) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"schema": "qgrid.record/99"}', "has schema `qgrid.record/99`; this qgrid reads"),
        ("[]", "has schema `none`"),
        ('{"schema": ', "is not JSON"),
        (f'{{"schema": "{RECORD_SCHEMA}", "status": "fine"}}', '`status="fine"` should be'),
    ],
)
def test_a_record_of_another_kind_is_one_clear_sentence(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = records.path(tmp_path, "c0ffee")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(records.UnreadableRecord, match=r"record\.json") as raised:
        records.read(tmp_path, "c0ffee")
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_planted_secrets_reach_no_file(
    tmp_path: Path, planned: PlannedCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    cell = dataclasses.replace(
        planned.cell,
        model=dataclasses.replace(
            planned.cell.model,
            id="https://alice:wonderland1@example.org/model?token=abcdef123456",
            revision=COMMIT,
        ),
        method=dataclasses.replace(
            planned.cell.method, options={"api_key": "plain-words", "act": f"use {HF}"}
        ),
    )
    failure = Failure("crashed", f"401 for Bearer {HF}", f"WANDB_API_KEY={WANDB} in env")
    record = dataclasses.replace(
        record_of(planned),
        cell=cell,
        status="crashed",
        error=failure,
        notes=("said correct-horse-battery aloud", f"key {WANDB}"),
        environment={"git_commit": COMMIT, "correct-horse-battery": 1},
    )
    text = records.write(tmp_path, record).read_text()
    job = Job("speed", dataclasses.replace(planned, cell=cell), "/a", None, "/o", "/s")
    records.save(tmp_path / "job.json", job)
    text += (tmp_path / "job.json").read_text()
    for secret in (
        "correct-horse", "wonderland1", "abcdef123456", "plain-words", HF, WANDB,
    ):  # fmt: skip
        assert secret not in text
    assert text.count(COMMIT) == 3  # a commit is no secret
    read = records.read(tmp_path, planned.cell_id)
    assert read is not None
    assert read.cell.model.id.startswith("https://[redacted]@example.org/model?token=[redacted]")


@pytest.mark.parametrize(
    "secret",
    [
        "git clone https://user:p4ssw0rd@host/repo",
        "GET /x?access_token=zyxwvutsrq&page=2",
        '{"password": "zyxwvutsrq"}',
        "Authorization: Basic dXNlcjpwYXNzd29yZA==",
        "authorization: zyxwvutsrq",
        f"login with {HF}",
        f"wandb: {WANDB}",
        "ghp_0123456789abcdefghijABCDEFGHIJ012345",
        "AKIAABCDEFGHIJKLMNOP",
        "sk-abcdefghijklmnopqrstuvwxyz",
        "X-Amz-Signature=0a1b2c3d4e5f",
        "HF_TOKEN='zyxwvutsrq'",
        "token: zyxwvutsrq-zyxwvutsrq",
    ],
)
def test_secrets_are_cut_out_of_text(secret: str) -> None:
    cleaned = redact.text(secret, ())
    assert redact.MARK in cleaned
    for part in ("p4ssw0rd", "zyxwvutsrq", "dXNlcjpw", HF, WANDB, "ghp_", "AKIAABC", "0a1b2c"):
        assert part not in cleaned
    assert redact.text(cleaned, ()) == cleaned


@pytest.mark.parametrize(
    "harmless",
    [
        "eos_token: <|end|>",
        "max_new_tokens=16, pad_token_id=0",
        "KeyError: 'model.layers.0.self_attn.k_proj.weight'",
        f"models--a--b/snapshots/{COMMIT}/config.json",
        f"revision={COMMIT}",
        "ab" * 32,
        "/data/outputs/cells/0123456789abcdef/record.json",
        f"/builds/{COMMIT}/outputs/artifacts",
        "see https://example.org/a@b",
        "tokenizer: equal to the base model's",
    ],
)
def test_what_is_no_secret_stays(harmless: str) -> None:
    assert redact.text(harmless, ()) == harmless


def test_settings_in_the_environment_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SSH_KEY_PATH", "/home/somebody/.ssh")
    monkeypatch.setenv("KEY_COUNT", "123456789")
    monkeypatch.setenv("DEPLOY_SECRET", "s3cr3t-enough")
    found = redact.environment_secrets()
    assert "s3cr3t-enough" in found
    assert not {"false", "/home/somebody/.ssh", "123456789"} & set(found)


def test_a_log_is_cleaned_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.txt"
    log.write_text(f"start\nusing {HF}\n")
    redact.file(log)
    assert log.read_text() == f"start\nusing {redact.MARK}\n"
    redact.file(tmp_path / "absent")


def test_the_schema_is_documented() -> None:
    text = DOCS.read_text()
    assert f"`{RECORD_SCHEMA}`" in text
    for kind in (Record, Measurement, Check, Failure):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in text, f"{kind.__name__}.{field.name}"


def test_the_example_in_the_docs_is_a_record() -> None:
    example = DOCS.read_text().split("```json\n")[1].split("```")[0]
    record = codec.loads(Record, example)
    assert record.status == "ok"
    assert json.loads(example)["schema"] == RECORD_SCHEMA


def test_a_record_with_keys_of_a_newer_version_is_not_damaged(
    tmp_path: Path, planned: PlannedCell
) -> None:
    file = records.write(tmp_path, record_of(planned))
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"colour": "blue"}))
    with pytest.raises(records.UnreadableRecord, match="newer qgrid") as caught:
        records.read(tmp_path, planned.cell_id)
    assert not isinstance(caught.value, records.DamagedRecord)
    file.write_text(json.dumps(data | {"colour": "blue", "status": 3}))
    with pytest.raises(records.DamagedRecord):
        records.read(tmp_path, planned.cell_id)
