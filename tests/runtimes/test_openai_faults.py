"""The runtime `openai` against a server that misbehaves on purpose, and one that is killed."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qgrid import stages
from qgrid.contracts import InvalidEngine, NoLogprobs, Unsupported
from qgrid.measure import quality, speed
from qgrid.measure.encoding import Encoder
from qgrid.runtimes import _openai_client as client
from qgrid.runtimes import openai
from qgrid.runtimes._openai_client import ServerLost
from qgrid.runtimes._openai_engine import Remote
from qgrid.runtimes._openai_probe import PROBE
from qgrid.serving import retrying
from qgrid.types import Cell, Prose, Slice, Slices, StageResult, Workload
from tests.servers import cells, processes
from tests.servers.faulty import Faulty, distribution, greedy, logprobs

KEY = "sk-test-0123456789abcdef0123"
IDS = [300, 301, 302, 303, 304, 305]
TRANSIENT = ["500", "429", "reset", "midway", "garbage", "error200", "short", "others", "null"]
EVERYTHING = frozenset({"ids", "echo", "tokenize", "models", "extensions"})


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(attempts: int) -> retrying.Retries:
        return retrying.Retries(attempts=attempts, first_seconds=0.02)

    monkeypatch.setattr(client, "Retries", quick)


@pytest.fixture
def slices(tmp_path: Path) -> Slices:
    """A slice of choices, one of replies, and prose, all of the random model's words."""
    words = ["red", "green", "blue", "amber", "north", "bridge", "river", "seven"]

    def write(name: str, *, choices: bool) -> Slice:
        lines = []
        for number in range(12):
            prompt = " ".join(words[(number * k) % 8] for k in range(1, 6))
            item: dict[str, Any] = {"id": f"{name}-{number}", "prompt": f"{prompt} {number}"}
            answer = words[number % 8]
            item |= {"answer": answer}
            if choices:
                item |= {"choices": list(dict.fromkeys([answer, "stone", "red river", "paper"]))}
            lines.append(json.dumps(item) + "\n")
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(lines))
        return Slice(str(path), "choice" if choices else "exact", True, None, 4)

    text = tmp_path / "prose.txt"
    text.write_text(" ".join(words[(i * i) % 8] for i in range(500)))
    items = {"choice": write("choice", choices=True), "exact": write("exact", choices=False)}
    return Slices("faulty", Prose(str(text), 400), items)


@pytest.fixture
def remote(
    tiny_random: Path, make_cell: Callable[..., Cell], tmp_path: Path
) -> Iterator[Callable[..., Remote]]:
    """The engine of a server: `remote(server, retries=0)`."""
    opened: list[Remote] = []

    def load(server: Faulty, **more: Any) -> Remote:
        cell = cells.cell(make_cell, server.base_url, more)
        opened.append(openai.load(tiny_random, cell, "bfloat16"))
        return opened[-1]

    yield load
    for each in opened:
        each.close()


@pytest.fixture
def job(
    tiny_random: Path, make_cell: Callable[..., Cell], slices: Slices, tmp_path: Path
) -> Callable[..., Any]:
    """`job("quality", base_url, retries=0)`."""

    def make(stage: Any, base_url: str, out: str = "out", **more: Any) -> Any:
        changes = {"slices": slices, "context": 50}
        changes |= {"workload": more.pop("workload")} if "workload" in more else {}
        cell = cells.cell(make_cell, base_url, more, **changes)
        folder = cells.artifact(cell, tiny_random, tmp_path / "artifact")
        return cells.job(stage, cell, folder, tmp_path / out)

    return make


def values(result: StageResult) -> dict[tuple[str, str | None], float]:
    return {(m.metric, m.slice): m.value for m in result.measurements}


def test_scores_are_those_of_the_formula(tiny_random: Path, remote: Callable[..., Remote]) -> None:
    with Faulty(tiny_random) as server:
        engine = remote(server, model="formula")
        found = list(engine.score([IDS, IDS[:3]], [4, 1], prefix=[7, 8]))
        alone = list(engine.chosen([[7, 8, *IDS]], [4]))
        assert len(engine.endpoint.extra) == 1
    wanted = logprobs([7, 8, *IDS])
    assert found[0].chosen.tolist() == wanted[-4:]
    assert (found[0].sequence, found[0].start, found[0].ids.shape) == (0, 4, (4, 20))
    assert (found[1].sequence, found[1].start) == (1, 4)
    best = distribution(IDS[1], 4)
    assert found[0].ids[0, 0] == int(best.argmax())
    assert found[0].logprobs[0, 0] == pytest.approx(best.max())
    assert alone[0].chosen.tolist() == wanted[-4:]
    assert alone[0].ids.shape == (4, 0)
    assert server.bodies[-1]["logprobs"] == 0


def test_replies_are_cut_at_the_first_stop(
    tiny_random: Path, remote: Callable[..., Remote]
) -> None:
    wanted = greedy(IDS, 6)
    with Faulty(tiny_random) as server:
        engine = remote(server)
        (whole,) = engine.generate([IDS], 6)
        (cut,) = engine.generate([IDS], 6, stop=[wanted[3]])
    assert list(whole.ids) == wanted
    assert list(cut.ids) == wanted[: wanted.index(wanted[3])]
    assert len(cut.seconds) == len(cut.ids)
    assert {body["temperature"] for body in server.bodies[-2:]} == {0}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_passes_is_asked_again_and_changes_nothing(
    fault: str, tiny_random: Path, job: Callable[..., Any]
) -> None:
    """Every text fails at its first attempt, but for the small requests that probe the server."""
    with Faulty(tiny_random) as server:
        known = quality.measure(job("quality", server.base_url, "healthy"))

    probe = Encoder(tiny_random).text(PROBE)

    def first(body: dict[str, Any], attempt: int) -> str | None:
        return fault if attempt == 1 and body["prompt"] not in (probe, PROBE) else None

    with Faulty(tiny_random, first) as server:
        found = quality.measure(job("quality", server.base_url, "faulty"))
        sent = len(server.bodies)
    assert found.observed["quality_requests"]["retried"] > 20
    assert found.observed["quality_requests"]["failed"] == 0
    assert sum(found.observed["failed_attempts"].values()) > 20
    assert sent > known.observed["quality_requests"]["sent"]
    assert values(found) == values(known)
    folder = Path(job("quality", "http://x/v1").out).parent
    lines = [(folder / name / "items.jsonl").read_text() for name in ("healthy", "faulty")]
    assert lines[0] == lines[1]


def test_retry_after_is_obeyed(tiny_random: Path, remote: Callable[..., Remote]) -> None:
    def busy(body: dict[str, Any], attempt: int) -> str | None:
        return "429" if body["prompt"] == IDS and attempt == 1 else None

    with Faulty(tiny_random, busy) as server:
        engine = remote(server)
        begin = time.monotonic()
        (found,) = engine.generate([IDS], 2)
        assert time.monotonic() - begin >= 0.3
    assert found.error is None and len(found.ids) == 2


@pytest.mark.parametrize("fault", ["400", "500", "stall", "reset"])
def test_what_fails_for_good_costs_its_item_only(
    fault: str, tiny_random: Path, job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Faulty(tiny_random) as server:
        known = quality.measure(job("quality", server.base_url, "healthy"))
    text = json.dumps(next(b["prompt"] for b in server.bodies if b["max_tokens"] == 4))

    def one(body: dict[str, Any], attempt: int) -> str | None:
        return fault if json.dumps(body["prompt"]) == text else None

    with Faulty(tiny_random, one) as server:
        wanted = job("quality", server.base_url, "faulty", deadline_seconds=1.0)
        found = quality.measure(wanted)
    assert values(found)["failed_items", "exact"] == 1
    lines = [
        json.loads(line) for line in (Path(wanted.out) / "items.jsonl").read_text().splitlines()
    ]
    assert sum("failed" in each for each in lines) == 1
    sizes = {(m.metric, m.slice): m.n for m in found.measurements}
    assert sizes["accuracy", "exact"] == 11
    assert found.observed["quality_requests"]["failed"] == 1
    for key, value in values(known).items():
        if key[1] != "exact":
            assert values(found)[key] == value


def test_too_much_silence_ends_the_stage_with_a_reason(
    tiny_random: Path, job: Callable[..., Any]
) -> None:
    with Faulty(tiny_random) as server:
        quality.measure(job("quality", server.base_url, "healthy"))
        asked = {json.dumps(b["prompt"]) for b in server.bodies if b["max_tokens"] == 4}
        texts = set(sorted(asked)[:4])

    def few(body: dict[str, Any], _: int) -> str | None:
        return "500" if json.dumps(body["prompt"]) in texts else None

    with Faulty(tiny_random, few) as server:
        result = stages.run(job("quality", server.base_url, "faulty"))
    assert result.failure is not None
    assert result.failure.status == "crashed"
    assert "items of slice `exact` got no answer" in result.failure.message
    assert "the engine fell over" in result.failure.message


def test_a_server_that_answers_nothing_any_more_is_given_up(
    tiny_random: Path, remote: Callable[..., Remote]
) -> None:
    with Faulty(
        tiny_random, lambda body, _: "reset" if len(body["prompt"]) == 70 else None
    ) as server:
        engine = remote(server, retries=1)
        with pytest.raises(ServerLost, match="requests in a row got no answer"):
            engine.generate([[i, *range(69)] for i in range(200)], 2)
        assert len(server.bodies) < 120  # not two for each of 200


def test_another_model_is_invalid(tiny_random: Path, remote: Callable[..., Remote]) -> None:
    with Faulty(tiny_random) as server:
        with pytest.raises(InvalidEngine, match=r"expected wanted, found formula"):
            remote(server, model="wanted")
        assert server.bodies == []  # nothing that could cost


def test_another_tokenizer_is_invalid(
    tiny_random: Path,
    remote: Callable[..., Remote],
    tmp_path: Path,
) -> None:
    stored = json.loads((tiny_random / "tokenizer.json").read_text())
    vocab = stored["model"]["vocab"]
    vocab["Ġ"], vocab["a"] = vocab["a"], vocab["Ġ"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    for gives in (EVERYTHING, EVERYTHING - {"echo"}):
        with (
            Faulty(tiny_random, tokenizer=tmp_path, gives=gives) as server,
            pytest.raises(InvalidEngine, match="served_tokenizer") as caught,
        ):
            remote(server)
        failed = [check.name for check in caught.value.checks if not check.ok]  # type: ignore[attr-defined]
        assert failed == ["served_tokenizer"]


def test_another_tokenizer_shows_in_its_counts(
    tiny_random: Path, remote: Callable[..., Remote], tmp_path: Path
) -> None:
    stored = json.loads((tiny_random / "tokenizer.json").read_text())
    stored["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    gives = EVERYTHING - {"tokenize"}
    with (
        Faulty(tiny_random, tokenizer=tmp_path, gives=gives) as server,
        pytest.raises(InvalidEngine, match="served_tokenizer"),
    ):
        remote(server)
    with Faulty(tiny_random, gives=gives) as server:
        assert remote(server).observed()["tokenizer_asked_by"] == "usage"


@pytest.mark.parametrize(
    ("gives", "more", "seen"),
    [
        (EVERYTHING, {}, ("ids", "echo", 20)),
        (EVERYTHING - {"extensions"}, {}, ("ids", "echo", 20)),
        (EVERYTHING, {"top_logprobs": 50}, ("ids", "echo", 5)),
        (EVERYTHING, {"logprobs": "none"}, ("ids", "none", 0)),
        (EVERYTHING - {"echo"}, {}, ("ids", "none", 0)),
        (EVERYTHING - {"ids"}, {}, ("text", "none", 0)),
        (EVERYTHING - {"ids", "extensions", "models"}, {"model": "formula"}, ("text", "none", 0)),
        (EVERYTHING, {"prompts": "text"}, ("text", "none", 0)),
    ],
)
def test_a_server_is_asked_in_the_best_way_that_it_takes(
    gives: frozenset[str],
    more: dict[str, Any],
    seen: tuple[str, str, int],
    tiny_random: Path,
    remote: Callable[..., Remote],
) -> None:
    prompt = [*range(260, 300)]
    with Faulty(tiny_random, gives=gives) as server:
        engine = remote(server, **more)
        found = engine.observed()
        assert (found["prompts"], found["logprobs"], found["top_logprobs"]) == seen
        (made,) = engine.generate([prompt], 3)
        if seen[1] == "none":
            with pytest.raises(NoLogprobs):
                list(engine.score([prompt], [2]))
        if seen[0] == "ids":
            assert server.bodies[-1]["prompt"] == prompt
        else:
            assert isinstance(server.bodies[-1]["prompt"], str)
        assert ("repetition_penalty" in server.bodies[-1]) == ("extensions" in gives)
    assert made.error is None


@pytest.mark.parametrize(
    ("gives", "more", "said"),
    [
        (EVERYTHING - {"ids"}, {"prompts": "ids"}, "prompt should be a string"),
        (EVERYTHING - {"echo"}, {"logprobs": "echo"}, "`runtime.logprobs=echo` cannot be had"),
    ],
)
def test_what_a_server_does_not_take_is_unsupported(
    gives: frozenset[str],
    more: dict[str, Any],
    said: str,
    tiny_random: Path,
    remote: Callable[..., Remote],
) -> None:
    with Faulty(tiny_random, gives=gives) as server, pytest.raises(Unsupported, match=said):
        remote(server, **more)


def test_a_list_of_models_is_needed_where_none_is_named(
    tiny_random: Path, remote: Callable[..., Remote]
) -> None:
    with (
        Faulty(tiny_random, gives=EVERYTHING - {"models"}) as server,
        pytest.raises(InvalidEngine, match=r"name one by `runtime.model`"),
    ):
        remote(server)


def test_nobody_there_is_said_soon(remote: Callable[..., Remote], tiny_random: Path) -> None:
    server = Faulty(tiny_random)  # never started
    with pytest.raises(ServerLost, match=r"the server cannot be asked: .*no connection"):
        remote(server)


def test_the_key_is_sent_and_written_nowhere(
    tiny_random: Path,
    job: Callable[..., Any],
    remote: Callable[..., Remote],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with Faulty(tiny_random, key=KEY) as server:
        monkeypatch.setenv("OTHER_KEY", KEY)
        result = stages.run(job("quality", server.base_url, api_key_env="OTHER_KEY"))
        assert result.failure is None
        assert KEY not in repr(result)
        assert KEY not in repr(remote(server, api_key_env="OTHER_KEY").endpoint)
        monkeypatch.setenv("OTHER_KEY", wrong := KEY[::-1])
        with pytest.raises(Unsupported, match=r"`runtime.api_key_env`") as caught:
            remote(server, api_key_env="OTHER_KEY")
        assert wrong not in str(caught.value)  # the server repeats it
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


def test_bad_requests_of_a_load_are_counted_and_kept_out(
    tiny_random: Path, job: Callable[..., Any]
) -> None:
    """One of each fault; all others are timed, and the stage ends."""
    faults = ["500", "429", "reset", "midway", "garbage", "stall", "length"]
    served: list[str] = []

    def in_turn(body: dict[str, Any], _: int) -> str | None:
        if not body.get("stream"):
            return None
        served.append("")
        place, left = divmod(len(served) - 31, 3)
        return faults[place] if left == 0 and 0 <= place < len(faults) else None

    workload = Workload("test", 8, 6, (4,), 2, 8, deadline_seconds=2.0)
    with Faulty(tiny_random, in_turn) as server:
        wanted = job("speed", server.base_url, workload=workload)
        result = speed.measure(wanted)
    lines = [
        json.loads(line) for line in (Path(wanted.out) / "samples.jsonl").read_text().splitlines()
    ]
    failed = [each for each in lines if each.get("error")]
    assert len(failed) == len(faults) - 1, [each["error"] for each in failed]
    assert result.observed["wrong_length"] == 1  # answered, but shorter than was asked for
    found = values(result)
    counted = [value for (metric, _), value in found.items() if metric == "failed_requests"]
    assert sum(counted) == len(faults) - 1
    assert found["output_throughput", "concurrency=4"] > 0


def test_a_usage_that_comes_twice_is_one(tiny_random: Path, job: Callable[..., Any]) -> None:
    workload = Workload("test", 8, 6, (2,), 2, 5)

    def twice(body: dict[str, Any], _: int) -> str | None:
        return "usage" if body.get("stream") else None

    with Faulty(tiny_random, twice) as server:
        price = {"input": 1.0, "output": 2.0, "source": "list", "date": "2026-11-01"}
        result = speed.measure(job("speed", server.base_url, workload=workload, price=price))
    found = values(result)
    assert found["failed_requests", "concurrency=2"] == 0
    assert found["usd_per_million_output_tokens", None] == pytest.approx(8 / 6 * 1.0 + 2.0)
    assert result.observed["price"]["source"] == "list"


def killed_when(server: processes.Served, ready: Callable[[], bool]) -> threading.Thread:
    def wait() -> None:
        until = time.monotonic() + 60
        while not ready() and time.monotonic() < until:
            time.sleep(0.01)
        server.kill()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def alone(tiny_random: Path, tmp_path: Path) -> Iterator[processes.Served]:
    """The server in a process of its own, 30 ms an answer."""
    port = processes.free_port()
    command = [sys.executable, "-m", "tests.servers.faulty", str(tiny_random), str(port), "0.03"]
    with processes.running(command, port, tmp_path / "server.log") as served:
        yield served


def test_a_kill_in_the_middle_of_quality_ends_the_stage(
    alone: processes.Served, job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[int] = []
    read = client.Client.ask

    def counted(self: Any, bodies: Sequence[Any], use: Any) -> Any:
        def noted(answer: dict[str, Any], number: int) -> Any:
            answered.append(number)
            return use(answer, number)

        return read(self, bodies, noted)

    monkeypatch.setattr(client.Client, "ask", counted)
    thread = killed_when(alone, lambda: len(answered) >= 20)
    result = stages.run(job("quality", alone.base_url, retries=1))
    thread.join(20)
    assert len(answered) >= 20
    assert result.failure is not None
    assert result.failure.status == "crashed"
    assert "got no answer" in result.failure.message
    assert result.measurements == ()


def test_a_kill_in_the_middle_of_a_load_ends_the_stage(
    alone: processes.Served, job: Callable[..., Any]
) -> None:
    """The rest of the load fails at once; what was answered before stays in the samples."""
    workload = Workload("test", 8, 40, (4,), 2, 5, rounds=5, deadline_seconds=5.0)
    wanted = job("speed", alone.base_url, workload=workload)
    begin = time.monotonic()
    thread = killed_when(alone, lambda: time.monotonic() - begin > 4.0)
    result = stages.run(wanted)
    thread.join(20)
    counted = {m.slice: m.value for m in result.measurements if m.metric == "failed_requests"}
    assert result.failure is not None or sum(counted.values()) > 0
    samples = Path(wanted.out) / "samples.jsonl"
    if samples.is_file():
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        assert any(each.get("error") for each in lines)
