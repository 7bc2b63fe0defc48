"""qgrid's load generator against `vllm bench serve`, on one server, in turns.

python tests/benchmarks/bench_serve.py [--pairs 6] [--concurrency 8] [--requests 64]

The server computes on one core, the clients take the other. Both send random prompts of the same
length with end-of-sequence ignored, after a warm-up, with so many at once; `vllm bench serve` sends
text that encodes to about as many tokens. Every turn shows how many processors others kept busy: a
server that shares its core is slower by as much. Wanted: output tok/s within 5 %, median TPOT
within 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qgrid import demo, stats
from qgrid.contracts import Endpoint
from qgrid.measure._vocabulary import vocabulary
from qgrid.measure.bystanders import Bystanders
from qgrid.running import processes
from qgrid.serving.http_driver import HttpDriver
from qgrid.serving.schedule import Load, Run
from qgrid.serving.summary import summary
from qgrid.types import Workload

SERVER_CORE, CLIENT_CORE = 0, 1
WANTED = {"output_throughput": "0.95 to 1.05", "tpot_ms": "0.90 to 1.10"}
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": str(SERVER_CORE),
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Target:
    """The server as qgrid's driver wants it."""

    endpoint: Endpoint

    def prompt(self, ids: Sequence[int]) -> list[int]:
        return list(ids)


def started(python: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    """The server, answering."""
    arguments = ["--model", str(demo.MODEL_DIR), "--port", str(port), "--host", "127.0.0.1"]
    arguments += ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048"]
    arguments += ["--no-enable-prefix-caching"]
    server = subprocess.Popen(
        [python, "-m", "vllm.entrypoints.openai.api_server", *arguments],
        env=os.environ | ENVIRONMENT,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    os.sched_setaffinity(server.pid, {SERVER_CORE})  # before it has begun anything of its own
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return server
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise SystemExit(f"the server ended by itself (its output: {log.read_text()[-2000:]})")


def through_qgrid(driver: HttpDriver, pair: int, vocab: list[int], given: Any) -> dict[str, float]:
    """Output tok/s and median TPOT as qgrid measures them."""
    rng = random.Random(pair)
    load = Load(users=given.concurrency)
    for repeat, count in ((-1, given.concurrency), (0, given.requests)):
        prompts = tuple(tuple(rng.choices(vocab, k=given.prompt)) for _ in range(count))
        samples = driver.run(Run(load, repeat, prompts, None))
    bad = [each for each in samples if each.error or each.output_tokens != given.output]
    assert not bad, bad[0]
    found = {each.metric: each.value for each in summary(samples)}
    prompt_tokens = statistics.fmean(each.prompt_tokens for each in samples)
    return {name: found[name] for name in (*WANTED, "ttft_ms")} | {"prompt": prompt_tokens}


# What the command `vllm bench serve` does, once for every line of arguments: to start it takes
# longer than to measure, and on a busy machine turns must be short.
PEER = """
import argparse, json, sys
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
print("ready", file=sys.stderr, flush=True)
for line in sys.stdin:
    main(parser.parse_args(json.loads(line)))
    print("measured", file=sys.stderr, flush=True)
"""


@contextmanager
def on_client_core() -> Iterator[None]:
    """This thread, and processes that it starts, keep off the server's core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CLIENT_CORE})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def started_peer(python: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `vllm bench serve` for every line of arguments."""
    with on_client_core():
        process = subprocess.Popen(
            [python, "-c", PEER],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    with process:
        wait_for("ready", process)
        yield process
        assert process.stdin is not None
        process.stdin.close()


def wait_for(word: str, process: subprocess.Popen[str]) -> None:
    """Read what the process says until it says `word`."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.strip() == word:
            return
    raise SystemExit("".join(said[-30:]))


def through_peer(
    process: subprocess.Popen[str], port: int, pair: int, given: Any
) -> dict[str, float]:
    """The same of `vllm bench serve`."""
    options = {
        "backend": "openai",
        "base-url": f"http://127.0.0.1:{port}",
        "model": str(demo.MODEL_DIR),
        "dataset-name": "random",
        "random-input-len": given.prompt,
        "random-output-len": given.output,
        "random-range-ratio": 0,
        "num-prompts": given.requests,
        "max-concurrency": given.concurrency,
        "num-warmups": given.concurrency,
        "temperature": 0,
        "seed": pair + 100,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--{name}={value}" for name, value in options.items()]
        arguments += ["--ignore-eos", "--disable-tqdm", "--save-result", f"--result-dir={folder}"]
        assert process.stdin is not None
        print(json.dumps(arguments), file=process.stdin, flush=True)
        wait_for("measured", process)
        (written,) = Path(folder).glob("*.json")
        found = json.loads(written.read_text())
    assert found["completed"] == given.requests
    assert found["total_output_tokens"] == given.requests * given.output
    return {
        "output_throughput": found["output_throughput"],
        "tpot_ms": found["median_tpot_ms"],
        "ttft_ms": found["median_ttft_ms"],
        "prompt": found["total_input_tokens"] / given.requests,
    }


def compare(python: str, port: int, given: argparse.Namespace) -> None:
    """Alternate, then print each and the ratio with its interval."""
    workload = Workload("bench", given.prompt, given.output, (given.concurrency,), 2, 5)
    extra = {"ignore_eos": True}
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", str(demo.MODEL_DIR), extra)
    vocab = vocabulary(demo.MODEL_DIR)
    found: dict[str, list[dict[str, float]]] = {"qgrid": [], "vllm bench": []}
    target: Any = Target(endpoint)
    with HttpDriver(target, workload) as driver, started_peer(python) as process:
        for pair in range(-1, given.pairs):  # the first warms up
            for name in ("qgrid", "vllm bench") if pair % 2 else ("vllm bench", "qgrid"):
                with Bystanders(2) as others, on_client_core():
                    one = (
                        through_qgrid(driver, pair, vocab, given)
                        if name == "qgrid"
                        else through_peer(process, port, pair, given)
                    )
                one["others"] = 0.0 if others.processors is None else others.processors
                print(pair, name, {k: round(v, 2) for k, v in one.items()}, flush=True)
                if pair >= 0:
                    found[name].append(one)
    for metric, wanted in {**WANTED, "ttft_ms": "only printed"}.items():
        both = zip(found["qgrid"], found["vllm bench"], strict=True)
        ratios = [mine[metric] / peers[metric] for mine, peers in both]
        low, high = stats.bootstrap_median(ratios)
        print(
            f"{metric}: qgrid / vllm bench {statistics.median(ratios):.3f} "
            f"[{low:.3f}, {high:.3f}], pairs {min(ratios):.3f} to {max(ratios):.3f} "
            f"(wanted: {wanted})"
        )


def main() -> None:
    """Start the server and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--python", help="the interpreter of the server's environment")
    given = parser.parse_args()
    python = given.python or processes.interpreter("vllm")
    with tempfile.TemporaryDirectory() as folder:
        server = started(python, given.port, Path(folder) / "server.log")
        try:
            compare(python, given.port, given)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


if __name__ == "__main__":
    main()
