"""Files that are never torn: atomic writes, folders built aside, locks, cached hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

_PART = 1 << 22  # bytes read between two looks whether to stop


def write_atomic(path: Path, data: str | bytes, durable: bool = True) -> None:
    """Replace `path` in one step. A reader sees the old file or the new one.

    `durable`: it also survives a loss of power; a file that can be made again need not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        aside.chmod(0o644)
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        raise


@contextlib.contextmanager
def built_aside(target: Path) -> Iterator[Path]:
    """A fresh folder next to `target` that becomes `target` when the block succeeds.

    Nothing is left of it when the block fails; an existing `target` is replaced in the end.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield aside
        aside.chmod(0o755)
        _replace(target, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(target: Path, aside: Path) -> None:
    """Rename `aside` to `target`; what was there keeps its bytes until that is done."""
    old = before(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        aside.rename(target)
    except BaseException:
        put_back(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def put_back(target: Path) -> None:
    """Rename the folder back that was to be replaced, where nothing has come into its place."""
    with contextlib.suppress(OSError):  # there is none, or there is a `target`
        before(target).rename(target)


def before(target: Path) -> Path:
    """Where a folder lies while another takes its place."""
    return target.with_name(f".{target.name}.old")


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold an advisory lock on `path` (created if absent); freed when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def machine_locks() -> Path:
    """The folder of the locks of this machine's cores and cards."""
    return _temporary() / "machine"


def user_cache(variable: str, name: str) -> Path:
    """The folder that an environment variable names, else `name` in qgrid's part of the cache."""
    if told := os.environ.get(variable):
        return Path(told).absolute()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # nobody's home is known, as of a bare number of a user in a container
        cache = _temporary()
    return cache.absolute() / "qgrid" / name


def _temporary() -> Path:
    """A folder of the user's own among the temporary ones."""
    return Path(tempfile.gettempdir()) / f"qgrid-{os.getuid()}"


def sha256(path: Path, stop: Callable[[], object] | None = None) -> str:
    """Hash of a file's content, read in one pass; `stop` may raise to give up half way."""
    if stop is None:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    found, part = hashlib.sha256(), memoryview(bytearray(_PART))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(part):
            found.update(part[:size])
            stop()
    return found.hexdigest()


class HashCache:
    """Hashes of files remembered by path, size, time and inode, so that 140 GB are read once."""

    def __init__(self, path: Path, stop: Callable[[], object] | None = None) -> None:
        """`stop` may raise to give up a hash half way."""
        self._path = path
        self._stop = stop
        self._known = self._read()

    def _read(self) -> dict[str, list[str]]:
        with contextlib.suppress(FileNotFoundError, ValueError):  # a torn file is begun anew
            known = json.loads(self._path.read_text(encoding="utf-8"))
            return known if isinstance(known, dict) else {}
        return {}

    def sha256(self, path: Path, fresh: bool = False) -> str:
        """The hash of `path`; `fresh` reads the file even when its hash is remembered."""
        key, stamp = _identity(path)
        entry = self._known.get(key)
        if entry and entry[0] == stamp and not fresh:
            return entry[1]
        self.remember({path: sha256(path, self._stop)})
        return self._known[key][1]

    def remember(self, hashes: Mapping[Path, str]) -> None:
        """Keep hashes that were just computed, e.g. before a folder was renamed."""
        new = {}
        for path, value in hashes.items():
            key, stamp = _identity(path)
            new[key] = [stamp, value]
        self._known |= self._read() | new  # others may have written since
        write_atomic(self._path, json.dumps(self._known))


def _identity(path: Path) -> tuple[str, str]:
    """A file's real place, and what changes when its content does."""
    stat = path.stat()
    return str(path.resolve()), f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
