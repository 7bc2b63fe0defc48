"""What a server takes and gives is found out, and another model or tokenizer is not measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid.contracts import InvalidEngine, NoLogprobs, Unsupported
from qgrid.running import stages
from qgrid.runtimes._openai_client import ServerLost
from qgrid.runtimes._openai_engine import Remote
from tests.servers.faulty import Faulty

KEY = "sk-test-0123456789abcdef0123"
EVERYTHING = frozenset({"ids", "echo", "tokenize", "models", "extensions"})


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
        pytest.raises(InvalidEngine, match=r"with `/v1`.*give `runtime.model`"),
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
        monkeypatch.setenv("OTHER_KEY", f"{KEY}\n")  # as a file of a secret holds it
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
