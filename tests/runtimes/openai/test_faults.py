"""Quality by a server that misbehaves on purpose."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid.measure import quality
from qgrid.measure.encoding import Encoder
from qgrid.running import stages
from qgrid.runtimes._openai_client import ServerLost
from qgrid.runtimes._openai_engine import Remote
from qgrid.runtimes._openai_probe import PROBE
from tests.servers import cells
from tests.servers.faulty import Faulty, distribution, greedy, logprobs

IDS = [300, 301, 302, 303, 304, 305]
TRANSIENT = ["500", "429", "reset", "midway", "garbage", "error200", "short", "others", "null"]


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
    assert cells.values(found) == cells.values(known)
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
    assert cells.values(found)["failed_items", "exact"] == 1
    lines = [
        json.loads(line) for line in (Path(wanted.out) / "items.jsonl").read_text().splitlines()
    ]
    assert sum("failed" in each for each in lines) == 1
    sizes = {(m.metric, m.slice): m.n for m in found.measurements}
    assert sizes["accuracy", "exact"] == 11
    assert found.observed["quality_requests"]["failed"] == 1
    for key, value in cells.values(known).items():
        if key[1] != "exact":
            assert cells.values(found)[key] == value


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
