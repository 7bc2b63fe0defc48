"""Secrets never reach a file: tokens, keys and passwords are cut out of every string written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARK = "[redacted]"
SHORTEST = 8  # characters; shorter values ("true", "1") are settings, not secrets

_NAME = r"token|key|secret|passw(?:or)?d|pwd|credentials?"
_SECRET_KEY = re.compile(
    r"(?:^|_|-)(?:token|secret|passw(?:or)?d|pwd|api_?key|access_?key|secret_?key|private_?key"
    r"|authorization|credentials?)$",
    re.IGNORECASE,
)
_COMMIT_KEY = re.compile(r"(?:revision|commit|sha1?)$", re.IGNORECASE)
_ENV_NAME = re.compile(_NAME, re.IGNORECASE)

# Each pattern keeps its group `keep` and replaces what follows it.
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<keep>[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@'\"]+(?=@)",  # user:password@host
        r"(?P<keep>\b(?i:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}",
        r"(?P<keep>\b(?i:authorization)[\"']?\s*[:=]\s*[\"']?)(?!(?i:bearer|basic)\b)[^\s\"',;&]+",
        # token=..., "api_key": "...", HF_TOKEN=...; not `eos_token=` nor `tokens=`
        r"(?P<keep>(?<![A-Za-z0-9_])(?i:(?:[a-z0-9]+[_-])?(?:api[_-]?key|access[_-]?key|secret[_-]?key"
        r"|private[_-]?key|access[_-]?token|auth[_-]?token|refresh[_-]?token|hf[_-]token"
        r"|password|passwd|pwd|secret|signature|sig))[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&)\]}]+",
        r"(?P<keep>(?<![A-Za-z0-9_])(?i:token|key)=[\"']?)[^\s\"',;&)\]}]{6,}",
        r"(?P<keep>(?<![A-Za-z0-9_])(?i:token)[\"']?\s*:\s*[\"']?)[^\s\"',;&)\]}]{12,}",
        r"(?P<keep>\b[A-Z0-9_]*(?:TOKEN|KEY|SECRET|PASSWORD)[A-Z0-9_]*=)[^\s\"',;&]{6,}",
        r"(?P<keep>)\bhf_[A-Za-z0-9]{16,}\b",
        r"(?P<keep>)\bwandb_v\d+_[A-Za-z0-9_]{20,}\b",
        r"(?P<keep>)\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})\b",
        r"(?P<keep>)\bglpat-[A-Za-z0-9_-]{16,}",
        r"(?P<keep>)\bsk-[A-Za-z0-9_-]{20,}",
        r"(?P<keep>)\bxox[abprs]-[A-Za-z0-9-]{10,}",
        r"(?P<keep>)\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
        r"(?P<keep>)\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",  # a signed token
    )
)
# What every pattern needs somewhere; most strings have none of it and are spared the patterns.
_SUSPECT = re.compile(
    r"[=:@]|(?i:bearer|basic)\s|hf_|wandb_|gh[pousr]_|github_pat_|glpat-|sk-|xox|AKIA|ASIA|eyJ"
)
# 40 hex digits are a W&B key, unless they stand where a git commit stands, as in a path.
_HEX40 = re.compile(
    r"(?<![0-9a-fA-F])"
    r"(?<!/)(?<!commit )(?<!revision=)"
    r"(?<!revision )(?<!revision': ')(?<!revision\": \")(?<!@)"
    r"[0-9a-f]{40}(?![0-9a-fA-F])"
)


def text(value: str, secrets: tuple[str, ...] | None = None) -> str:
    """`value` without secrets. `secrets` are the known ones (default: those of the environment)."""
    for secret in environment_secrets() if secrets is None else secrets:
        value = value.replace(secret, MARK)
    for pattern in _PATTERNS if _SUSPECT.search(value) else ():
        value = pattern.sub(_cut, value)
    return _HEX40.sub(MARK, value)


def plain(value: Any) -> Any:
    """Plain data (dicts, lists, scalars) with every string, also every key, passed through `text`.

    A string under a key that names a secret (`password`, `api_key`) goes whole; a commit under
    `revision` or `commit` stays.
    """
    return _walk(value, environment_secrets())


def environment_secrets() -> tuple[str, ...]:
    """Values of the environment variables whose names say token, key, secret or password."""
    found = {
        value
        for name, value in os.environ.items()
        if _ENV_NAME.search(name) and len(value) >= SHORTEST and not _is_setting(value)
    }
    return tuple(sorted(found, key=len, reverse=True))


def file(path: Path) -> None:
    """Remove secrets from a text file, in one step; a file without any is not touched."""
    from qgrid.files import write_atomic

    try:
        before = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    after = text(before)
    if after != before:
        write_atomic(path, after)


def _cut(found: re.Match[str]) -> str:
    """What replaces a match; what was cut before stays as it is."""
    keep = found["keep"]
    return found[0] if found[0][len(keep) :].startswith(MARK[:-1]) else keep + MARK


def _is_setting(value: str) -> bool:
    """A path, a number or a switch: `SSH_KEY_PATH=/home/me/.ssh` would blank half of a record."""
    return value.startswith(("/", "~")) or value.replace(".", "").isdigit()


def _walk(value: Any, secrets: tuple[str, ...], key: str = "") -> Any:
    if isinstance(value, str):
        if _SECRET_KEY.search(key) and value:
            return MARK
        return value if _is_commit(key, value) else text(value, secrets)
    if isinstance(value, Mapping):
        return {text(str(k), secrets): _walk(v, secrets, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walk(item, secrets, key) for item in value]
    return value


def _is_commit(key: str, value: str) -> bool:
    return (
        bool(_COMMIT_KEY.search(key)) and re.fullmatch(r"[0-9a-f]{40}(-dirty)?", value) is not None
    )
