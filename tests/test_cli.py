"""The command line: wrong commands end in one sentence and code 2; own files are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qgrid import registry

ROOT = Path(__file__).parent.parent


def qgrid(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qgrid", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | env,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method=gptqq"], ["gptqq", "gptq", "awq"]),
        (["bitz=4"], ["bitz"]),
        (["-m", "method=rtn,gptq", "bits=four"], ["bits=four", "whole number"]),
        (
            ["method=rtn", "method.group_sise=64"],
            ["group_sise", "did you mean `method.group_size`"],
        ),
        (["method=nf4", "method.group_size=64"], ["method.group_size", "but of", "gptq"]),
        (["slices.items={}"], ["slices.items={}", "nothing", "as `~slices.items.classification`"]),
        (["method=rtn", "method.group_size=x"], ["method.group_size", "x", "integer"]),
        (["method=nf4", "bits=8"], ["empty", "nf4", "bits=8", "has: 4"]),
        (["method=rtn", "method.scheme=W4A16", "bits=8"], ["disagree", "bits=8"]),
        (["out=a,b"], ["out", "cannot be swept"]),
        (["+sweeps=nothing"], ["nothing"]),
        (["model=hf"], ["model.id"]),
        (["model=hf", "model.id=./nowhere"], ["nowhere", "folder"]),
        (["slices.items.code.path=gone.jsonl"], ["gone.jsonl"]),
        (["report"], ["no sweep"]),
        (["reprot"], ["reprot", "did you mean `report`"]),
        (["plan", "method=rtn", "kv_cache=int3"], ["int3", "auto16"]),
        (["~calibration"], ["`calibration` is missing"]),
        (["+contxt=5"], ["contxt", "did you mean `context`"]),
        (["method={a: 1}"], ["`method` takes the name of a choice"]),
        (["model=null"], ["NoneType"]),
        (["hydra.mode=RUN"], ["hydra.mode=RUN", "leave"]),
        (["hydra/sweeper=basic"], ["hydra/sweeper=qgrid"]),
        (["hydra/launcher=basic"], ["hydra/launcher=local"]),
        (["+sweeps=demo,bits"], ["sweeps", "cannot be swept"]),
        (["name=../../x"], ["name=", "letters"]),
        (["name="], ["name=", "letters"]),
        (["rerun=oom,opps"], ["rerun=opps", "timeout", "stale"]),
        (["gpu.memory_gib=9"], ["gpu=auto", "gpu=h100"]),
        (["context=5000"], ["context", "5000", "4096"]),
        (["model=hf", "model.id=."], ["model.id=.", "config.json"]),
        (["model=hf", "model.id=''"], ["model.id=", "folder"]),
        (["method=rtn", "slices.items.code.path=package:nope.nope/x"], ["nope.nope", "package"]),
        (["plan", "out=/dev/null/x"], ["Not a directory", "/dev/null/x"]),
    ],
)
def test_a_wrong_command_is_one_sentence(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    done = qgrid(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "outputs" / "sweeps").exists()
    assert not (tmp_path / "multirun.yaml").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["report", "-h"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; from qgrid.__main__ import main; code = main({arguments!r}); "
        "heavy = {'torch', 'transformers', 'wandb', 'numpy', 'hydra'} & set(sys.modules); "
        "assert code == 0 and not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "method=" in done.stdout


def test_a_python_without_the_environment_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['hydra'] = None; from qgrid.__main__ import main; "
        "sys.exit(main(['plan', 'method=rtn']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "activate" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_runtime_whose_environment_is_not_built_tells_the_command(tmp_path: Path) -> None:
    done = qgrid("plan", "runtime=vllm", "method=none", cwd=tmp_path, QGRID_ENVS=str(tmp_path))
    assert done.returncode == 2
    assert "`vllm` needs the environment `vllm`; run `python -m qgrid setup vllm`" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_setup_lists_the_environments(tmp_path: Path) -> None:
    done = qgrid("setup", cwd=tmp_path, QGRID_ENVS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sys.executable in done.stdout
    assert "not built; run `python -m qgrid setup vllm`" in done.stdout
    assert qgrid("setup", "vlm", cwd=tmp_path).returncode == 2


def test_cfg_shows_a_configuration(tmp_path: Path) -> None:
    done = qgrid("--cfg", "job", "method=nf4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "name: nf4" in done.stdout


def test_plan_of_a_committed_grid_with_an_override(tmp_path: Path) -> None:
    done = qgrid("plan", "+sweeps=demo", "bits=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("8 cells: 7 run, 1 unsupported")


def test_a_key_that_only_the_swept_choices_have(tmp_path: Path) -> None:
    done = qgrid("plan", "-m", "method=rtn,gptq", "method.group_size=64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 cells: 3 run (1 baseline added)")


def test_a_broken_file_of_a_user_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "own" / "gpu").mkdir(parents=True)
    (tmp_path / "own" / "gpu" / "torn.yaml").write_text("name: [x\n  y: :\n")
    done = qgrid("plan", "bits=4", "--config-dir", "own", "gpu=torn", cwd=tmp_path)
    assert done.returncode == 2
    assert "torn.yaml" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_plan_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "sweeps" / "old"
    folder.mkdir(parents=True)
    (folder / "plan.jsonl").write_text('{"cell_id": "x"}\n')
    for verb in ("report", "sync"):
        done = qgrid(verb, cwd=tmp_path)
        assert done.returncode == 2
        assert "`artifact_id` is missing" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_read_enough_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qgrid", "plan", "bits=null", "seed=range(0,2000)"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_method_whose_module_is_broken_is_one_sentence(tmp_path: Path) -> None:
    own = own_folder(tmp_path)
    (tmp_path / "site" / "their_method.py").write_text("import no_such_library\n")
    done = qgrid(
        "plan", "method=mine", "--config-dir", str(own), cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    )  # fmt: skip
    assert done.returncode == 2
    assert "`method=mine` cannot be imported from `their_method`" in done.stderr
    assert done.stderr.count("no_such_library") == 1
    assert len(done.stderr.splitlines()) == 1
    doctor = qgrid("doctor", "--quick", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert doctor.returncode == 0, doctor.stderr
    assert "no_such_library" in doctor.stdout


def test_glob_takes_the_choices_of_a_group(tmp_path: Path) -> None:
    done = qgrid("plan", "method=glob([rtn,gp*,aw*,nf*,none],exclude=none)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("5 cells: 5 run (1 baseline added)")


def test_a_committed_grid_begins_with_its_command() -> None:
    for file in (ROOT / "sweeps").glob("*.yaml"):
        header, command = file.read_text().splitlines()[:2]
        assert header == "# @package _global_"  # Hydra reads it on the first line only
        assert command == f"# python -m qgrid +sweeps={file.stem}"


def test_doctor_names_every_method(tmp_path: Path) -> None:
    done = qgrid("doctor", "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name in (*registry.names("methods"), *registry.names("runtimes")):
        assert "works here" not in lines[name]  # nothing was tried


def test_own_yaml_and_own_method_are_planned(tmp_path: Path) -> None:
    own = own_folder(tmp_path)
    done = qgrid(
        "plan",
        "--config-dir",
        str(own),
        "gpu=b200",
        "method=mine",
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("2 cells: 2 run (1 baseline added)")


def own_folder(tmp_path: Path) -> Path:
    """A user's repository: a GPU and slices as YAML, a method and a runtime by entry points."""
    own = tmp_path / "own"
    for group, name, text in [
        (
            "gpu",
            "b200",
            "name: b200\nkind: cuda\nmatch: B200\ncapability: sm_100\n"
            "memory_gib: 180\nbandwidth_gb_s: 8000\ncount: 1\n",
        ),
        (
            "slices",
            "mine",
            "name: mine\nprose: null\nitems:\n  tickets: {path: tickets.jsonl, "
            "scoring: choice, chat: true, limit: null, max_new_tokens: 8}\n",
        ),
        ("method", "mine", (ROOT / "conf/method/rtn.yaml").read_text().replace("rtn", "mine", 1)),
        (
            "runtime",
            "theirs",
            (ROOT / "conf/runtime/transformers.yaml")
            .read_text()
            .replace("name: transformers", "name: theirs"),
        ),
    ]:
        (own / group).mkdir(parents=True, exist_ok=True)
        (own / group / f"{name}.yaml").write_text(text)
    items = [
        {"id": f"t{i}", "level": 1, "prompt": f"{i}+1=", "choices": ["0", str(i)], "answer": "0"}
        for i in range(1, 9)
    ]
    (own / "tickets.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    site = tmp_path / "site"
    (site / "theirs-1.0.dist-info").mkdir(parents=True)
    (site / "theirs-1.0.dist-info" / "METADATA").write_text("Name: theirs\nVersion: 1.0\n")
    (site / "theirs-1.0.dist-info" / "entry_points.txt").write_text(
        "[qgrid.methods]\nmine = their_method\n[qgrid.runtimes]\ntheirs = their_runtime\n"
    )
    (site / "their_method.py").write_text(
        "from qgrid.methods.rtn import *\n"
        "from qgrid.methods.rtn import SUPPORTS, Options, quantize\n"
    )
    (site / "their_runtime.py").write_text(
        "from qgrid.runtimes.transformers import LOADS, Options, load\n"
    )
    return own


@pytest.mark.slow
def test_own_method_runtime_and_slices_run(tmp_path: Path) -> None:
    own = own_folder(tmp_path)
    done = qgrid(
        "--config-dir", str(own), "method=mine", "bits=8", "runtime=theirs", "slices=mine",
        "tracking=none", "workload.repeats=2", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tickets" in done.stdout


def write_sweep(folder: Path, *grids: str) -> None:
    (folder / "sweeps").mkdir()
    lines = "\n".join(f"      - {{{grid}}}" for grid in grids)
    (folder / "sweeps" / "two.yaml").write_text(
        "# @package _global_\n# python -m qgrid +sweeps=two\nhydra:\n  sweeper:\n"
        f"    params: {{bits: '4,8'}}\n    grids:\n{lines}\n"
    )


def test_a_committed_sweep_may_join_several_grids(tmp_path: Path) -> None:
    write_sweep(tmp_path, "method: rtn", "method: 'rtn,gguf', runtime: llama_cpp")
    done = qgrid("plan", "--config-dir", str(tmp_path), "+sweeps=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # rtn at two widths and its baseline; gguf and its own; rtn is not for llama.cpp
    assert "8 cells: 6 run, 2 unsupported (2 baselines added)" in done.stdout


def test_the_command_line_replaces_an_axis_in_every_grid(tmp_path: Path) -> None:
    write_sweep(tmp_path, "method: rtn", "method: gptq")
    done = qgrid("plan", "--config-dir", str(tmp_path), "+sweeps=two", "bits=3", cwd=tmp_path)
    assert "3 cells: 3 run (1 baseline added)" in done.stdout


def test_a_setting_in_one_of_several_grids_is_refused(tmp_path: Path) -> None:
    write_sweep(tmp_path, "method: rtn", "method: gptq, out: elsewhere")
    done = qgrid("plan", "--config-dir", str(tmp_path), "+sweeps=two", cwd=tmp_path)
    assert done.returncode == 2
    assert "`hydra.sweeper.grids` lists axes of cells" in done.stderr
