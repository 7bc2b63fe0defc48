"""The environment that vLLM lives in, for tests that run programs of ours there."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from qgrid import codec
from qgrid.running import interpreters
from qgrid.types import Cell

ROOT = Path(__file__).parents[2]
SECONDS = 900.0  # of one program; a machine may be busy


def command(module: str) -> tuple[list[str], dict[str, str]]:
    """How to run a module of the tests in vLLM's environment: arguments and variables.

    Raises:
        UnknownInterpreter: nobody has built it here; the message has the command that does.
    """
    shown = Path(tempfile.mkdtemp(prefix="qgrid-tests-"))
    variables = interpreters.variables("vllm", shown)
    variables["PYTHONPATH"] = f"{ROOT}:{variables['PYTHONPATH']}"
    return [interpreters.interpreter("vllm"), "-m", module], variables


def run(module: str, *arguments: str) -> None:
    """Run it to its end; its output is shown where it fails."""
    words, variables = command(module)
    done = subprocess.run(
        [*words, *arguments], env=variables, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def write_cell(folder: Path, name: str, cell: Cell) -> str:
    """The cell as a file that a program there reads."""
    path = folder / f"{name}.json"
    path.write_text(codec.dumps(cell))
    return str(path)
