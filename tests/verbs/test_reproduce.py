"""`reproduce`: what differs is named before anything runs; every number is held to its rule."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qgrid import commands, environment, registry
from qgrid.envs import locks as environments
from qgrid.planning import facts
from qgrid.reproduction import sweep_lock
from qgrid.store import leases
from qgrid.verbs import reproduce
from tests import faults, locks
from tests.drills import trivial
from tests.locks import Project


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    locks.install(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A sweep of three cells that was run."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        locks.install(patch, root)
        yield locks.run(root / "project")
    registry.names.cache_clear()


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of it, in another place; its lock finds the copied files."""
    return finished.copied(tmp_path / "project")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Exit code and lines of `reproduce` of a project's lock."""

    def reproduced(project: Project, *flags: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = reproduce.main([str(project.lock), f"out={project.out}", *flags])
        return code, capsys.readouterr().out.splitlines()

    return reproduced


Run = Callable[..., tuple[int, list[str]]]


def edit(project: Project, change: Callable[[dict[str, Any]], object]) -> None:
    data = yaml.safe_load(project.lock.read_text())
    change(data)
    project.lock.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def listed(lines: list[str]) -> list[str]:
    """The differences; what comes behind them is of the run."""
    behind = itertools.takewhile(lambda line: not line.endswith("to run"), lines)
    return [line.removeprefix("- ") for line in behind if line.startswith("- ")]


def verdicts(project: Project) -> list[dict[str, Any]]:
    file = project.out / "reproduced" / "trivial" / "sweeps" / "trivial" / "reproduction.json"
    return [verdict for each in json.loads(file.read_text())["cells"].values() for verdict in each]


# --- the same again ------------------------------------------------------------------------------


def test_the_same_machine_reproduces_every_number(project: Project, run: Run) -> None:
    code, lines = run(project)
    assert code == 0
    assert "nothing differs from the lock" in lines
    heads = [line for line in lines if re.match(r"mine .*: (reproduced|drifted)$", line)]
    assert [line.rpartition(": ")[2] for line in heads] == ["reproduced"] * 3
    assert any(line.startswith("3 of 3 cells reproduced; ") for line in lines)

    found = verdicts(project)
    judged = {each["metric"] for each in found if each["outcome"] == "reproduced"}
    assert {"status", "files", "items", "ppl", "accuracy", "kld_topk_mean"} <= judged
    assert all(each["outcome"] != "drifted" for each in found)
    again = sweep_lock.read(project.out / "reproduced/trivial/sweeps/trivial/sweep.lock.yaml")
    old = sweep_lock.read(project.lock)
    assert list(again.cells) == list(old.cells)  # the ids are made of contents, not of places
    assert again.qualities == old.qualities
    assert again.artifacts == old.artifacts


def test_a_dry_run_names_the_differences_and_runs_nothing(project: Project, run: Run) -> None:
    assert run(project, "--dry-run")[0] == 0
    assert not (project.out / "reproduced").exists()


# --- what differs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("data/colours.jsonl", "slice `colours` of slices `own`"),
        ("data/prose.txt", "prose of slices `own`"),
        ("models/mine/config.json", "`config.json` of model `mine`"),
        ("models/mine/tokenizer_config.json", "`tokenizer_config.json` of model `mine`"),
    ],
)
def test_an_altered_file_is_named(project: Project, run: Run, file: str, name: str) -> None:
    with (project.root / file).open("a") as text:
        text.write("\n")
    code, lines = run(project, "--dry-run")
    assert code == 1
    assert "differs from the lock:" in lines
    [found] = listed(lines)
    assert re.fullmatch(rf"{re.escape(name)}: [0-9a-f]{{12}} -> [0-9a-f]{{12}}", found)


def test_an_altered_weight_file_is_named(project: Project, run: Run) -> None:
    (project.root / "models/mine/model.safetensors").write_bytes(b"weights")
    [found] = listed(run(project, "--dry-run")[1])
    assert found.startswith("`model.safetensors` of model `mine`: absent -> ")


def test_an_altered_pin_is_named(
    project: Project, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = environments.named(".txt")
    before = own["main"].read_text(encoding="utf-8")
    torch = environments.pins("main", "cpu")["torch"]
    (tmp_path / "main.txt").write_text(before.replace(f"torch=={torch}", "torch==9.9.9"))
    changed = {**own, "main": tmp_path / "main.txt"}
    monkeypatch.setattr(environments, "named", lambda suffix: changed)
    cached = (environments.pins, environment.locked_versions, facts.locked)
    try:
        for each in cached:
            each.cache_clear()
        code, lines = run(project, "--dry-run")
    finally:
        for each in cached:
            each.cache_clear()
    assert code == 1
    assert listed(lines) == [f"torch (pinned in `main`): {torch} -> 9.9.9"]


def test_versions_seen_are_named_with_old_and_new(project: Project, run: Run) -> None:
    now = environment.provenance()

    def change(data: dict[str, Any]) -> None:
        [seen] = data["environments"].values()
        seen["python"] = "3.9.1"
        seen["versions"]["numpy"] = "1.0"
        seen["versions"]["gone"] = "7"
        seen["cpu_flags"] = [*seen["cpu_flags"], "avx1024"]
        seen["driver"] = ["570.1"]
        seen["threads"]["OMP_NUM_THREADS"] = "64"

    edit(project, change)
    code, lines = run(project, "--dry-run")
    assert code == 1
    assert listed(lines) == [
        f"python: 3.9.1 -> {now['python']}",
        "driver: 570.1 -> -",
        "cpu_flags: avx1024 -> -",
        f"numpy: 1.0 -> {now['versions']['numpy']}",
        "gone: 7 -> absent",
        "OMP_NUM_THREADS (threads): 64 -> 1",
    ]


def test_what_only_some_cells_had_is_counted(project: Project, run: Run) -> None:
    def change(data: dict[str, Any]) -> None:
        [seen] = data["environments"].values()
        data["environments"]["other"] = {**copy.deepcopy(seen), "qgrid": "0.0.9"}
        next(iter(data["cells"].values()))["environment"] = "other"

    edit(project, change)
    [found] = listed(run(project, "--dry-run")[1])
    assert found.startswith("qgrid (1 of 3 cells): 0.0.9 -> ")


def test_an_environment_of_its_own_is_compared_too(project: Project, run: Run) -> None:
    def change(data: dict[str, Any]) -> None:
        [seen] = data["environments"].values()
        seen["elsewhere"] = {"main": {"environment": "main", "versions": {"numpy": "1.0"}}}

    edit(project, change)
    [found] = listed(run(project, "--dry-run")[1])
    assert found.startswith("numpy (in the environment `main`): 1.0 -> ")


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("data/colours.jsonl", "`slices=own`: no file `./data/colours.jsonl`"),
        ("models/mine", "`model=mine`: no folder `./models/mine`"),
    ],
)
def test_a_missing_file_is_one_sentence_and_nothing_runs(
    project: Project, run: Run, gone: str, words: str
) -> None:
    (project.root / gone).rename(project.root / "elsewhere")
    code, lines = run(project)
    assert code == 1
    sentences = [line for line in lines if line.startswith("cannot be run here: ")]
    assert len(sentences) == 1
    assert words in sentences[0]
    assert not (project.out / "reproduced").exists()


def test_an_option_that_this_version_lacks_is_one_sentence(project: Project, run: Run) -> None:
    edit(project, lambda data: data["parts"]["methods"]["trivial"]["options"].update(new=1))
    code, lines = run(project)
    assert code == 1
    assert sum("method=trivial.new" in line for line in lines) == 1
    assert not (project.out / "reproduced").exists()


def test_identities_made_by_other_rules_are_told(project: Project, run: Run) -> None:
    def change(data: dict[str, Any]) -> None:
        data["cells"] = {f"{key[:-1]}x": cell for key, cell in data["cells"].items()}

    edit(project, change)
    assert listed(run(project, "--dry-run")[1]) == [
        "identities of 3 cells: the lock's -> made by other rules here"
    ]


# --- what drifts ---------------------------------------------------------------------------------


def test_each_number_that_is_another_one_is_named(project: Project, run: Run) -> None:
    def change(data: dict[str, Any]) -> None:
        cell = list(data["cells"].values())[1]
        [ppl] = [row for row in cell["measurements"] if row[0] == "ppl"]
        ppl[2] += 1e-9
        answers = data["qualities"][cell["quality_id"]]["colours"]
        answers["items"] = f"{answers['items'][:8]}AAAA{answers['items'][12:]}"
        answers["digest"] = "0" * 16
        data["artifacts"][cell["artifact_id"]]["files"]["levels.txt"] = "0" * 64

    edit(project, change)
    code, lines = run(project)
    assert code == 1
    drifted = [each for each in verdicts(project) if each["outcome"] == "drifted"]
    assert [(each["metric"], each["slice"]) for each in drifted] == [
        ("files", None),
        ("items", "colours"),
        ("ppl", None),
    ]
    assert "  drifted: items of colours: 1 of 8 items differ, 0 of them in being right" in lines
    assert any(
        line.startswith("  drifted: files: 1 of ") and "levels.txt" in line for line in lines
    )
    assert any("drifted: ppl: " in line and "inside the recorded" in line for line in lines)
    assert any(line.startswith("2 of 3 cells reproduced; ") for line in lines)


def test_another_slice_gives_other_items_and_says_why(project: Project, run: Run) -> None:
    file = project.root / "data" / "colours.jsonl"
    first, *rest = file.read_text().splitlines()
    item = json.loads(first)
    item["answer"] = next(each for each in item["choices"] if each != item["answer"])
    file.write_text("\n".join([json.dumps(item), *rest, ""]))
    code, lines = run(project)
    assert code == 1
    assert [line.split(":")[0] for line in listed(lines)] == ["slice `colours` of slices `own`"]
    items = [each for each in verdicts(project) if each["metric"] == "items"]
    assert [each["outcome"] for each in items] == ["drifted"] * 3
    assert all(each["why"].startswith("1 of 8 items differ") for each in items)
    ppl = [each["outcome"] for each in verdicts(project) if each["metric"] == "ppl"]
    assert ppl == ["reproduced"] * 3


def test_a_runtime_that_says_it_is_not_deterministic_is_held_to_intervals(
    project: Project, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = registry.runtime("trivial")
    monkeypatch.setattr(module, "deterministic", lambda cell: cell.bits == 16, raising=False)

    def change(data: dict[str, Any]) -> None:
        for cell in data["cells"].values():
            [ppl] = [row for row in cell["measurements"] if row[0] == "ppl"]
            ppl[2] += 1e-9

    edit(project, change)
    assert run(project)[0] == 1
    found = [each["outcome"] for each in verdicts(project) if each["metric"] == "ppl"]
    assert sorted(found) == ["drifted", "reproduced", "reproduced"]
    items = [each["outcome"] for each in verdicts(project) if each["metric"] == "items"]
    assert sorted(items) == ["not judged", "not judged", "reproduced"]


def test_cells_of_another_described_machine_run_here_with_timings_unjudged(
    project: Project, run: Run
) -> None:
    def change(data: dict[str, Any]) -> None:
        [gpu] = data["parts"]["gpus"].values()
        gpu.update(name="Another CPU, 96 cores", match="Another CPU, 96 cores")

    edit(project, change)
    code, lines = run(project)
    assert code == 1
    assert any(re.match(r"device: .* -> ", line) for line in listed(lines))
    found = verdicts(project)
    speed = [each for each in found if each["metric"] in {"ttft_ms", "decode_throughput"}]
    assert len(speed) == 6
    assert {each["outcome"] for each in speed} == {"not judged"}
    quality = [each for each in found if each["metric"] in {"ppl", "items", "status"}]
    assert {each["outcome"] for each in quality} == {"reproduced"}


def test_a_lock_without_results_reproduces_nothing(project: Project, run: Run) -> None:
    edit(project, lambda data: [cell.update(status=None) for cell in data["cells"].values()])
    code, lines = run(project)
    assert code == 1
    assert any("3 cells have no results in the lock" in line for line in lines)
    assert sum(line.endswith("no results to compare with") for line in lines) == 3


# --- interrupted, finished, two at once ----------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_one_goes_on_and_a_finished_one_is_measured_anew(tmp_path: Path) -> None:
    project, _ = locks.planned(tmp_path / "project", speed_pause=0.8)
    ledger = tmp_path / "ledger.jsonl"
    quiet = {"TMPDIR": str(tmp_path)}  # machine locks of its own
    first = trivial.variables(**quiet)
    subprocess.run(trivial.command(project.sweep), env=first, check=True, capture_output=True)
    told = trivial.variables(**quiet, QGRID_TRIVIAL_LEDGER=str(ledger))
    command = [sys.executable, "-m", "qgrid", "reproduce", "trivial", f"out={project.out}"]

    def timed() -> int:
        return sum((e["stage"], e["event"]) == ("speed", "end") for e in trivial.ledger(ledger))

    process = subprocess.Popen(command, env=told, stdout=subprocess.PIPE, text=True)
    store = project.out / "reproduced" / "trivial"
    faults.wait_for(lambda: list(store.glob("cells/*/record.json")), "a first record")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=faults.SECONDS)
    assert process.returncode == 130
    assert "cells reproduced" not in out
    done = len(list(store.glob("cells/*/record.json")))
    assert 0 < done < 3
    before = timed()

    ended = subprocess.run(command, env=told, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{done} done before" in ended.stdout
    assert timed() - before <= 3 - done + 1
    after = timed()

    assert subprocess.run(command, env=told, capture_output=True).returncode == 0
    assert timed() - after == 3


def test_two_at_once_in_one_folder_are_refused(project: Project) -> None:
    store = project.out / "reproduced" / "trivial"
    (store / "sweeps" / "trivial" / "launches" / "abc").mkdir(parents=True)
    lease = leases.attempt(leases.of(store, "launches", "abc"))
    assert lease is not None
    try:
        with pytest.raises(commands.WrongCommand, match=f"process {os.getpid()} .* already"):
            reproduce.main([str(project.lock), f"out={project.out}"])
    finally:
        lease.release()


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["trust_remote_code", "allow_pickle"])
def test_code_of_others_is_run_only_when_asked_for(project: Project, run: Run, key: str) -> None:
    edit(project, lambda data: data["parts"]["models"]["mine"].update({key: True}))
    with pytest.raises(commands.WrongCommand, match=rf"`mine` asks for `{key}`.*--trust"):
        run(project)
    assert not (project.out / "reproduced").exists()
    assert run(project, "--dry-run", "--trust")[0] in {0, 1}


def test_a_server_is_asked_only_when_the_lock_is_trusted(project: Project, run: Run) -> None:
    def change(data: dict[str, Any]) -> None:
        runtime = next(iter(data["parts"]["runtimes"].values()))
        runtime.update(name="openai", options={"base_url": "http://198.51.100.7/v1"})

    edit(project, change)
    with pytest.raises(commands.WrongCommand, match=r"http://198\.51\.100\.7/v1.*--trust"):
        run(project)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "no lock"), (["a", "b"], "takes LOCK"), (["a", "--now"], "takes LOCK")],
)
def test_a_wrong_command_is_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(commands.WrongCommand, match=words):
        reproduce.main(arguments)


def test_the_command_line_takes_a_path_a_folder_or_a_sweep(
    project: Project, tmp_path: Path
) -> None:
    def qgrid(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "qgrid", "reproduce", *words],
            env=trivial.variables(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    out = f"out={project.out}"
    for name in (str(project.lock), str(project.sweep), "trivial"):
        done = qgrid(name, out, "--dry-run")
        assert (done.returncode, "nothing differs" in done.stdout) == (0, True), done.stderr
    assert qgrid("nothing", out).returncode == 2
    assert "every sweep writes" in qgrid("nothing", out).stderr
    project.lock.write_text("schema: other\n")
    broken = qgrid("trivial", out)
    assert (broken.returncode, broken.stderr.count("\n")) == (2, 1)
    assert "qgrid.lock/1" in broken.stderr
