"""What a configuration or a checkpoint says is data: it names no place, starts nothing, loads no
pickle and no code; and what the environment keeps secret stays there."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import qgrid
from qgrid import codec, config, models, redact
from qgrid.__main__ import main
from qgrid.planning import choices
from qgrid.store import records
from qgrid.types import Choice, Method, Model, PlannedCell
from tests import faults, stores
from tests.drills import trivial

HOSTILE = (
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "| touch pwned &",
    "a  b\tc",
    "two\nlines",
    "carriage\rreturn",
    "../../pwned",
    "/pwned",
    "..",
    "~root",
    "-rf",
    "--config-dir=/pwned",
    "%j%A%a%u",
    "${HOME} ${hydra:runtime.cwd}",
    "{0} {name} %s",
    "[bold]loud[/bold] [/]",
    "<script>alert(1)</script>",
    "naïve 模型 \u202e",
    "\\n\\0\\",
    "x" * 300,
)
ROOT = Path(qgrid.__file__).parent


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    stores.install(monkeypatch, tmp_path_factory.mktemp("tmp"))


def named(name: str, folder: Path) -> Choice:
    """A cell whose model, slice, texts and load bear a name."""
    plain = trivial.choice()
    item = trivial.SLICES.items["colours"]
    return replace(
        plain,
        model=Model(name, str(folder), None, False, False),
        slices=replace(trivial.SLICES, name=name, items={name: item}),
        workload=replace(plain.workload, name=name),
        calibration=replace(plain.calibration, name=name),
    )


# --- names and places ----------------------------------------------------------------------------


def test_names_are_data_from_the_plan_to_the_tables(tmp_path: Path) -> None:
    """Also where the store and the model lie in folders with such names."""
    work, place = tmp_path / "work", tmp_path / "a b'\"$(touch pwned)`touch pwned`;%j&|*?[x]{y}\n~ü"
    work.mkdir()
    model = place / "mo del'\"$(touch pwned)"
    shutil.copytree(trivial.MODEL.id, model)
    store = place / "out"
    folder, cells = trivial.write([named(name, model) for name in HOSTILE], store)
    assert {cell.cell.model.name for cell in cells} == set(HOSTILE)

    ended = stores.run(folder, work)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = records.read_all(store, cells)
    assert {record.status for record in found.values()} == {"ok"}
    assert {record.cell.model.name for record in found.values()} == set(HOSTILE)
    slices = {m.slice for record in found.values() for m in record.measurements if m.slice}
    assert set(HOSTILE) <= slices
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["work", place.name])
    assert list(work.iterdir()) == []
    assert sorted(path.name for path in place.iterdir()) == sorted([model.name, "out"])
    assert not any("pwned" in path.name for path in store.rglob("*"))
    assert "<script>alert(1)" not in (folder / "report.html").read_text()
    assert not Path("/pwned").exists()


@pytest.mark.parametrize("name", [each for each in HOSTILE if each != "x" * 300] + ["", ".", "a/b"])
def test_a_sweep_s_name_is_one_folder_s(name: str, compose: config.Compose) -> None:
    grid = config.expand(compose, [])
    with pytest.raises((config.GridError, codec.InvalidValue)) as caught:
        choices.settings({**grid.fixed, "name": name})
    assert "`name=" in str(caught.value)


@pytest.mark.parametrize("name", ["../pwned", "/pwned", "$(touch pwned)"])
@pytest.mark.parametrize("verb", ["status", "cancel", "resume", "report", "sync"])
def test_a_verb_takes_the_name_of_a_sweep_and_no_path(
    tmp_path: Path, name: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    trivial.write([trivial.choice()], store)
    before = sorted(tmp_path.rglob("*"))
    assert main([verb, name, f"out={store}"]) == 2
    assert name in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("hub_id", ["../../etc", "/etc", "a/../../b", "$(touch pwned)/x", "-x/y"])
def test_a_model_that_is_no_checkpoint_is_one_sentence(hub_id: str) -> None:
    with pytest.raises(models.ModelNotFound) as caught:
        models.resolve(Model("m", hub_id, None, False, False))
    assert f"`model.id={hub_id}`" in str(caught.value)


# --- pickles and foreign code --------------------------------------------------------------------


class Evil:
    """What a pickle can do."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._marker), "w")


def real(model: Path) -> PlannedCell:
    """A cell of the real libraries on a folder."""
    cell = faults.cell(model)
    options = {"attn_implementation": "sdpa", "kernel": "auto"}
    runtime = replace(cell.runtime, name="transformers", options=options)
    return faults.planned(replace(cell, method=Method("none", {}), runtime=runtime))


def run_real(cell: PlannedCell, store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run one cell with the real libraries; its status and why."""
    from qgrid.running import controller

    faults.install(monkeypatch)
    controller.run([cell], faults.settings(store), faults.folder(store))
    record = records.read(store, cell.cell_id)
    assert record is not None
    return f"{record.status}: {'' if record.error is None else record.error.message}"


@pytest.mark.slow
def test_a_pickle_is_not_loaded(
    tiny_random: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, marker = tmp_path / "model", tmp_path / "pwned"
    shutil.copytree(tiny_random, model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    pickle.loads(pickle.dumps(Evil(tmp_path / "shown")))  # so it would have shown
    assert (tmp_path / "shown").exists()
    ended = run_real(real(model), tmp_path / "store", monkeypatch)
    assert ended.startswith(("bad_artifact: ", "crashed: "))
    assert "safetensors" in ended
    assert not marker.exists()


@pytest.mark.slow
def test_code_of_a_checkpoint_does_not_run(
    tiny_random: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, marker = tmp_path / "model", tmp_path / "pwned"
    shutil.copytree(tiny_random, model)
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import *\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (model / name).write_text(code)
    for file, told in (
        (
            "config.json",
            {
                "AutoConfig": "configuration_evil.LlamaConfig",
                "AutoModelForCausalLM": "modeling_evil.LlamaForCausalLM",
            },
        ),
        (
            "tokenizer_config.json",
            {"AutoTokenizer": [None, "tokenization_evil.PreTrainedTokenizerFast"]},
        ),
    ):
        data = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(data | {"auto_map": told}))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert run_real(real(model), tmp_path / "store", monkeypatch).startswith("ok")
    assert not marker.exists()


def test_no_choice_of_a_model_allows_either() -> None:
    files = sorted((config.root("conf") / "model").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        told = yaml.safe_load(file.read_text())
        assert told["trust_remote_code"] is False
        assert told["allow_pickle"] is False


def calls() -> Iterator[tuple[str, ast.Call | ast.Import | ast.ImportFrom]]:
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Call, ast.Import, ast.ImportFrom)):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node


def test_the_package_pickles_nothing_and_starts_no_shell() -> None:
    banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "submitit"}
    seen = 0
    for place, node in calls():
        seen += 1
        if isinstance(node, ast.Import):
            assert not {each.name.split(".")[0] for each in node.names} & banned, place
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] not in banned, place
        else:
            told = {each.arg: each.value for each in node.keywords}
            assert "shell" not in told, place
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "os.system", "os.popen"}, place
            if name == "torch.load":
                assert ast.unparse(told["weights_only"]) == "True", place
    assert seen > 1000


# --- secrets -------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_0123456789abcdefghij",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "COMPANY_PASSWORD": "correct horse battery",
    "SERVICE_SECRET": "s3cr3t-$(value)",
}


def texts(store: Path) -> Iterator[tuple[Path, str]]:
    for path in store.rglob("*"):
        if path.is_file():
            yield path, path.read_text(errors="replace")


def leaks(store: Path, secrets: Sequence[str]) -> list[str]:
    return [str(path) for path, text in texts(store) if any(each in text for each in secrets)]


def test_no_secret_of_the_environment_reaches_a_file_or_the_screen(tmp_path: Path) -> None:
    store = tmp_path / "store"
    folder, _ = trivial.write([trivial.choice(8)], store)
    ended = stores.run(folder, tmp_path, **SECRETS)
    assert ended.returncode == 0, ended.stdout
    assert leaks(store, list(SECRETS.values())) == []
    assert not any(secret in ended.stdout + ended.stderr for secret in SECRETS.values())
    assert len(list(texts(store))) > 10


@pytest.mark.slow
def test_what_a_failing_stage_says_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin's error holds a password in a URL."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    cell = faults.planned(faults.cell(model, "raise", runtime="light"))
    ended = run_real(cell, tmp_path / "store", monkeypatch)
    assert redact.MARK in ended
    assert leaks(tmp_path / "store", ["hunter2"]) == []
