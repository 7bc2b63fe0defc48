"""A server that misbehaves on purpose; its model is a formula, so that every number is known.

`with Faulty(folder, faults) as server:` or `python -m tests.servers.faulty FOLDER PORT SECONDS`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from aiohttp import web
from tokenizers import Tokenizer

from tests.servers.processes import free_port
from tests.servers.threaded import Threaded

VOCAB = 512
LIMIT = 20  # of `logprobs`, as vLLM's
Faults = Callable[[dict[str, Any], int], str | None]  # body, attempt -> what goes wrong


def none(_: dict[str, Any], __: int) -> None:
    """Nothing goes wrong."""


@cache
def distribution(last: int, place: int) -> npt.NDArray[np.float64]:
    """Log-probabilities of the token at `place`, which depend on the token before it."""
    raw = 2.0 * np.random.default_rng([last, place]).standard_normal(VOCAB)
    found: npt.NDArray[np.float64] = raw - np.log(np.exp(raw).sum())
    return found


def logprobs(ids: Sequence[int]) -> list[float]:
    """Of every token but the first."""
    return [float(distribution(ids[i - 1], i)[ids[i]]) for i in range(1, len(ids))]


def greedy(ids: Sequence[int], count: int) -> list[int]:
    made = list(ids)
    for _ in range(count):
        made.append(int(distribution(made[-1], len(made)).argmax()))
    return made[len(ids) :]


class Faulty(Threaded):
    """A vLLM-like server in a thread of this process, or alone in its own."""

    def __init__(
        self,
        folder: Path,
        faults: Faults = none,
        name: str = "formula",
        key: str | None = None,
        gives: frozenset[str] = frozenset({"ids", "echo", "tokenize", "models", "extensions"}),
        port: int = 0,
        seconds: float = 0.0,
        tokenizer: Path | None = None,
    ) -> None:
        self.port = port or free_port()
        self.bodies: list[dict[str, Any]] = []
        self.attempts: Counter[str] = Counter()
        self._faults, self._name, self._key, self._gives = faults, name, key, gives
        self._seconds = seconds  # that every answer takes
        self._tokenizer = Tokenizer.from_file(str((tokenizer or folder) / "tokenizer.json"))

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/completions", self._completions)
        if "models" in self._gives:
            app.router.add_get("/v1/models", self._models)
        if "tokenize" in self._gives:
            app.router.add_post("/tokenize", self._tokenize)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        await self.until_left()
        await runner.cleanup()

    def _refusal(self, request: web.Request) -> web.Response | None:
        said = request.headers.get("Authorization")
        if self._key is None or said == f"Bearer {self._key}":
            return None
        # some servers repeat what they were given
        return _error(401, f"no such key: {said}")

    async def _models(self, request: web.Request) -> web.Response:
        entry = {"id": self._name, "owned_by": "formula", "max_model_len": 4096, "permission": []}
        return self._refusal(request) or web.json_response({"data": [entry]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        text = (await request.json())["prompt"]
        return web.json_response({"tokens": self._encoded(text)})

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        refusal = self._refusal(request) or self._objection(body)
        if refusal is not None:
            return refusal
        place = json.dumps(body["prompt"])
        self.attempts[place] += 1
        await asyncio.sleep(self._seconds)
        fault = self._faults(body, self.attempts[place])
        if body.get("stream"):
            return await self._streamed(request, body, fault)
        return await self._answered(request, self._answer(body), fault)

    def _objection(self, body: dict[str, Any]) -> web.Response | None:
        if "extensions" not in self._gives and "repetition_penalty" in body:
            return _error(400, "Unrecognized request argument supplied: repetition_penalty")
        if "ids" not in self._gives and not isinstance(body["prompt"], str):
            return _error(422, "prompt should be a string")
        if body.get("logprobs", 0) > LIMIT:
            return _error(400, f"at most {LIMIT} logprobs")
        return None

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        ids = self._encoded(prompt) if isinstance(prompt, str) else prompt
        made = greedy(ids, body["max_tokens"])
        choice: dict[str, Any] = {
            "index": 0,
            "text": self._tokenizer.decode(made, skip_special_tokens=True),
            "finish_reason": "length",
        }
        if body.get("return_token_ids"):
            choice["token_ids"] = made
        if body.get("echo") and "echo" in self._gives:
            choice["logprobs"] = self._told([*ids, *made], body)
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(made)}
        return {"model": self._name, "choices": [choice], "usage": usage}

    def _told(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        by_id = body.get("return_tokens_as_token_ids")

        def name(token: int) -> str:
            return f"token_id:{token}" if by_id else self._tokenizer.decode([token])

        tops: list[dict[str, float] | None] = [None]
        for place in range(1, len(ids)):
            values = distribution(ids[place - 1], place)
            best = np.argsort(-values)[: body["logprobs"]]
            tops.append({name(int(i)): float(values[i]) for i in [ids[place], *best]})
        tokens = [name(token) for token in ids]
        return {"tokens": tokens, "token_logprobs": [None, *logprobs(ids)], "top_logprobs": tops}

    async def _answered(
        self, request: web.Request, answer: dict[str, Any], fault: str | None
    ) -> web.StreamResponse:
        if fault is None:
            return web.json_response(answer)
        spoiled = _spoiled(answer, fault)
        if spoiled is not None:
            return spoiled
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "midway":
            whole = json.dumps(answer).encode()
            response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
            await response.prepare(request)
            await response.write(whole[: len(whole) // 2])
        _cut(request)
        return web.Response()

    async def _streamed(
        self, request: web.Request, body: dict[str, Any], fault: str | None
    ) -> web.StreamResponse:
        count = body["max_tokens"]
        if fault in {"500", "429"}:
            return _spoiled({}, fault) or web.Response()
        if fault == "reset":
            _cut(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(count - 2 if fault == "length" else count):
            if fault in {"midway", "stall", "garbage"} and number == count // 2:
                if fault == "midway":
                    _cut(request)
                elif fault == "stall":
                    await asyncio.sleep(3600)
                await response.write(b"<html>busy</html>\n\n")
            last = number == count - 1
            choice = {"index": 0, "text": " a", "finish_reason": "length" if last else None}
            await _event(response, {"choices": [choice]})
            await asyncio.sleep(0.002)
        made = count - 2 if fault == "length" else count
        told = {"prompt_tokens": len(body["prompt"]), "completion_tokens": made}
        for _ in range(2 if fault == "usage" else 1):
            await _event(response, {"choices": [], "usage": told})
        await response.write(b"data: [DONE]\n\n")
        return response


def _spoiled(answer: dict[str, Any], fault: str) -> web.Response | None:
    """Answers that come whole and are wrong."""
    if fault == "500":
        return _error(500, "the engine fell over")
    if fault == "400":
        return _error(400, "this prompt is not welcome")
    if fault == "429":
        return _error(429, "slower, please", {"Retry-After": "0.3"})
    if fault == "garbage":
        return web.Response(text="<html>busy</html>", content_type="text/html")
    if fault == "error200":
        return web.json_response({"error": {"message": "overloaded", "code": 503}})
    if fault in {"short", "others", "null"}:
        told = answer["choices"][0].get("logprobs")
        if told is None:
            return web.json_response({"choices": []})
        if fault == "short":
            del told["token_logprobs"][-2:]
        elif fault == "others":
            told["tokens"][1] = "token_id:0" if told["tokens"][1] != "token_id:0" else "token_id:1"
        else:
            told["token_logprobs"][-1 - len(answer["choices"][0]["token_ids"])] = None
        return web.json_response(answer)
    return None


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


async def _event(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")


def _cut(request: web.Request) -> None:
    """End the connection at once, as a server that is killed."""
    if request.transport is not None:
        request.transport.abort()
    raise asyncio.CancelledError


if __name__ == "__main__":
    asyncio.run(
        Faulty(Path(sys.argv[1]), port=int(sys.argv[2]), seconds=float(sys.argv[3])).serve()
    )
