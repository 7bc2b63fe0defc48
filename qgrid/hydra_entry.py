"""Entering Hydra: where its files are, and its errors as one sentence with exit code 2."""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from qgrid import config, redact, sweep
from qgrid.planning import keys
from qgrid.store import place

_SEEN_BY_HYDRA = re.compile(r"[~+]*(hydra\b|sweeps\b)")
DETACH = "--detach"
PLUGINS = Path(__file__).parent / "_plugins"  # holds the namespace package `hydra_plugins`


def enter(arguments: list[str]) -> int:
    """Run Hydra's main with `arguments`; the exit code."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    sys.path.insert(0, str(PLUGINS))
    sweep.COMMAND.set(tuple(arguments))
    sweep.DETACH.set(DETACH in arguments)
    arguments = [argument for argument in arguments if argument != DETACH]
    sys.argv = ["qgrid", *_for_hydra(arguments)]
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting with 1
    warnings.formatwarning = _plain_warning
    entry = hydra.main(
        version_base="1.3", config_path=str(config.root("conf")), config_name="config"
    )(_nothing)
    expected = (
        HydraException,
        OmegaConfBaseException,
        YAMLError,
        ValueError,  # of qgrid's own kinds, and Hydra's for `model=null`
        OSError,
    )
    try:
        entry()
    except expected as error:
        if wants_trace or isinstance(error, BrokenPipeError):
            raise
        print(f"qgrid: {redact.text(sentence(error))}", file=sys.stderr)  # noqa: T201
        return 1 if place.is_unwritable(error) else 2
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    return 0


def _for_hydra(arguments: list[str]) -> list[str]:
    """What Hydra must see before the sweeper composes cells: flags, `hydra.*` and `+sweeps=`.

    Hydra first composes one configuration without the swept groups, in which
    `method=rtn,gptq method.group_size=64` fails: `none`, the default method, has no such key. So
    the overrides of a grid go to the sweeper alone.
    """
    from hydra._internal.utils import get_args_parser

    args = get_args_parser().parse_intermixed_args(arguments)  # flags may stand anywhere
    flags = [argument for argument in arguments if argument not in args.overrides]
    if args.cfg or args.info or args.hydra_help or args.shell_completion:
        return [*flags, *args.overrides]
    seen = [line for line in args.overrides if _SEEN_BY_HYDRA.match(line)]
    sweep.OVERRIDES.set(tuple(line for line in args.overrides if line not in seen))
    return [*flags, *seen]


def _nothing(_: Any) -> None:
    """Hydra wants a task; the sweeper does all the work, unless `hydra.mode` goes around it."""
    raise config.GridError("`hydra.mode=RUN` would run nothing; leave `hydra.mode` out")


def sentence(error: BaseException) -> str:
    """The useful message of an error, which Hydra often keeps in the cause, on one line."""
    while error.__cause__ is not None and not str(error).strip():
        error = error.__cause__
    if isinstance(error, OSError) and error.errno is not None:
        return place.sentence(error)
    if isinstance(error, UnicodeDecodeError) and (file := _not_text()) is not None:
        return f"{file} is not UTF-8 ({error.reason} at byte {error.start}); correct or remove it"
    text = " ".join(str(error).split())
    if choice := re.search(
        r"Could not find '([^']+)/([^']+)'(?: Available options in .*?: (.*?) Config search)?", text
    ):
        return _unknown_choice(*choice.groups())
    if key := re.match(r"Could not override '([^']+)'", text):
        if key[1] in keys.KEYS:
            return (
                f"`{key[1]}` takes the name of a choice; its keys are given as `{key[1]}.KEY=...`"
            )
        return keys.unknown_key(key[1])
    cause = "" if error.__cause__ is None else " ".join(str(error.__cause__).split())
    return text if cause in text else f"{text} ({cause})"


def _not_text() -> Path | None:
    """The configuration that is no text: YAML's own error does not name it."""
    own = os.environ.get("QGRID_CONFIG_DIR")
    roots = [config.root("conf"), config.root("sweeps"), *([] if own is None else [Path(own)])]
    for root in roots:
        for file in sorted(root.rglob("*.yaml")):
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return file
            except OSError:
                continue
    return None


def _unknown_choice(group: str, name: str, options: str | None) -> str:
    known = (options or "").split()
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return f"`{group}={name}` is unknown (has: {', '.join(known) or 'none'}){hint}"


def _plain_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"qgrid: {message}\n"
