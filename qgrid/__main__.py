"""The command line: a verb, or Hydra. `python -m qgrid -m method=awq,gptq bits=4,8`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qgrid import config

USAGE = """\
qgrid measures quantized language models: which one do you ship?

  python -m qgrid [-m] [OVERRIDE ...]     run a grid (Hydra overrides: method=awq,gptq bits=4,8)
  python -m qgrid +sweeps=NAME [...]      run a committed grid
  python -m qgrid plan [OVERRIDE ...]     the same grid, printed and not run
  python -m qgrid status|resume [SWEEP]   how far it is; go on where it stopped
  python -m qgrid cancel SWEEP            end it, here and in the queue; what has ended stays
  python -m qgrid report [SWEEP]          rewrite and print the tables of a sweep from its records
  python -m qgrid sync [SWEEP]            replay records into Weights & Biases
  python -m qgrid workspace               save the W&B workspace with parallel coordinates (login)
  python -m qgrid reproduce LOCK          run a sweep.lock.yaml again and compare every number
  python -m qgrid fsck | gc [--dry-run]   check and mend the store; free artifacts that nobody needs
  python -m qgrid doctor                  which methods, runtimes and environments work
  python -m qgrid setup [NAME]            build an environment that a runtime needs, or list them

A key with several values makes a grid of all combinations. Keys and choices:
{choices}
  bits=2,3,4,8 context=TOKENS seed=N name=SWEEP out=FOLDER
  rerun=[oom,timeout,crashed,stale,unstable] fresh=true verify=full

`hydra/launcher=slurm` runs the same grid on a cluster; `--detach` returns once it is under way.
Hydra's own flags work too: --cfg job shows a configuration, --config-dir adds your own folder,
--hydra-help lists the rest. Exit code: 0 good, 1 a cell failed or none is ok, 2 a wrong command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments and arguments[0] in VERBS else None
    rest = arguments[1:] if verb else arguments
    _remember_config_dir(rest)
    if "--help" in rest or "-h" in rest:
        print(USAGE.format(choices=_choices(rest)), end="")
        return 0
    if verb is None and rest and rest[0].isidentifier():
        return _wrong(_unknown_verb(rest[0]))
    try:
        return VERBS[verb](rest) if verb else _grid(rest)
    except ModuleNotFoundError as error:
        return _wrong(
            f"this Python has no module `{error.name}`; activate qgrid's environment "
            "(`. .venv/bin/activate` after `make run`) or `pip install` qgrid"
        )
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `qgrid plan | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _grid(arguments: list[str]) -> int:
    """Plan and run (or print) a grid through Hydra."""
    from qgrid import hydra_entry

    return hydra_entry.enter(arguments)


def _plan(arguments: list[str]) -> int:
    from qgrid import sweep

    sweep.PLAN_ONLY.set(True)
    return _grid(arguments)


def _report(arguments: list[str]) -> int:
    from qgrid import report

    return _on_sweep("report", arguments, report.rewrite)


def _sync(arguments: list[str]) -> int:
    from qgrid.mirroring import tracking

    return _on_sweep("sync", arguments, tracking.sync)


def _workspace(arguments: list[str]) -> int:
    from qgrid.mirroring import workspace

    return workspace.main(arguments)


def _setup(arguments: list[str]) -> int:
    from qgrid.envs import construct, locks, setup

    try:
        return setup.main(arguments)
    except (setup.WrongSetup, locks.UnknownEnvironment) as error:
        return _wrong(str(error))
    except construct.NotBuilt as error:
        print(f"qgrid: {error}", file=sys.stderr)
        return 1


def _module(name: str) -> Callable[[list[str]], int]:
    """A verb whose module has a `main`."""

    def run(arguments: list[str]) -> int:
        from qgrid import commands
        from qgrid.store import place

        try:
            return int(importlib.import_module(name).main(arguments))
        except commands.WrongCommand as error:
            return _wrong(str(error))
        except BrokenPipeError:
            raise
        except OSError as error:
            _wrong(place.sentence(error))
            return 1 if place.is_unwritable(error) else 2
        except ValueError as error:  # a file that this version cannot read
            return _wrong(" ".join(str(error).split()))

    return run


VERBS: dict[str | None, Callable[[list[str]], int]] = {
    "plan": _plan,
    "status": _module("qgrid.verbs.status"),
    "cancel": _module("qgrid.verbs.cancel"),
    "resume": _module("qgrid.verbs.resume"),
    "report": _report,
    "reproduce": _module("qgrid.verbs.reproduce"),
    "sync": _sync,
    "workspace": _workspace,
    "fsck": _module("qgrid.verbs.fsck"),
    "gc": _module("qgrid.verbs.gc"),
    "doctor": _module("qgrid.verbs.doctor"),
    "setup": _setup,
}


def _on_sweep(verb: str, arguments: list[str], act: Callable[[Path, str | None], int]) -> int:
    """Run a verb that takes an optional sweep name and `out=FOLDER`."""
    from qgrid import commands
    from qgrid.store import place

    try:
        given = commands.parse(verb, arguments, "[SWEEP] [out=FOLDER]")
        folder = commands.sweep_folder(given)
        return act(given.out, folder.name if given.names else None)
    except BrokenPipeError:
        raise
    except OSError as error:
        _wrong(place.sentence(error))
        return 1 if place.is_unwritable(error) else 2
    except ValueError as error:  # a record or a plan that this version cannot read
        return _wrong(" ".join(str(error).split()))


def _unknown_verb(word: str) -> str:
    known = [name for name in VERBS if name]
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else "; an override is KEY=VALUE"
    return f"`{word}` is no command (has: {', '.join(known)}){hint}"


def _wrong(sentence: str) -> int:
    from qgrid import redact

    print(f"qgrid: {redact.text(sentence)}", file=sys.stderr)
    return 2


def _remember_config_dir(arguments: list[str]) -> None:
    """Paths in a user's own YAML are found relative to the folder of `--config-dir`."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        if flag in ("--config-dir", "-cd"):
            os.environ["QGRID_CONFIG_DIR"] = str(Path(value).absolute())
        elif flag.startswith("--config-dir="):
            os.environ["QGRID_CONFIG_DIR"] = str(Path(flag.partition("=")[2]).absolute())


def _choices(arguments: list[str]) -> str:
    """The groups and their files, a user's own included."""
    folders = [config.root("conf"), Path(os.environ.get("QGRID_CONFIG_DIR", "/nonexistent"))]
    groups: dict[str, list[str]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*/*.yaml")):
            groups.setdefault(file.parent.name, []).append(file.stem)
    sweeps = sorted(file.stem for file in config.root("sweeps").glob("*.yaml"))
    groups["+sweeps"] = sweeps
    return "\n".join(f"  {name}={','.join(stems)}" for name, stems in groups.items())


if __name__ == "__main__":
    sys.exit(main())
