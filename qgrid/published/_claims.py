"""Values of a published `config.json`, each of the kind that it has to be, or one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FILE = "config.json"
_UNSET: tuple[Any, ...] = (None, False, "", [], {}, "none")


class Unreadable(ValueError):
    """A checkpoint that cannot be read here; the message continues "the checkpoint ..."."""


class Claims:
    """A JSON object of a config, and where in the file it lies.

    Every method raises `Unreadable` where a value is none that it can be, naming file and key.
    """

    def __init__(self, told: object, place: str = "", file: str = FILE) -> None:
        self._place, self._file = place, file
        if not isinstance(told, Mapping):
            raise Unreadable(self._told_of(place, told, "an object of keys"))
        self._told: Mapping[str, Any] = told

    def __iter__(self) -> Iterator[str]:
        return iter(self._told)

    def count(self, key: str, *also: int) -> int:
        """A whole number above 0, or one of `also`."""
        found = self._told.get(key)
        if type(found) is not int or (found <= 0 and found not in also):
            whole = "a whole number above 0"
            raise self._wrong(key, " or ".join([whole, *map(str, also)]))
        return found

    def counts(self, key: str) -> list[int]:
        """A list of two whole numbers above 0."""
        found = self._told.get(key)
        if not isinstance(found, list) or len(found) != 2:
            raise self._wrong(key, "a list of two whole numbers")
        return [self._inner({key: each}, self._place).count(key) for each in found]

    def flag(self, key: str, absent: bool = False) -> bool:
        """True or false; `absent` where it is missing or null."""
        found = self._told.get(key)
        if found is not None and type(found) is not bool:
            raise self._wrong(key, "true or false")
        return absent if found is None else found

    def name(self, key: str, *allowed: str) -> str:
        """A string, one of `allowed`."""
        found = self._told.get(key)
        if not isinstance(found, str) or found not in allowed:
            raise self._wrong(key, f"one of {', '.join(allowed)}")
        return found

    def word(self, key: str) -> str:
        """A string."""
        found = self._told.get(key)
        if not isinstance(found, str):
            raise self._wrong(key, "a name")
        return found

    def text(self, key: str, *allowed: str) -> str | None:
        """A string, one of `allowed` if there are any; None where it is missing or null."""
        found = self._told.get(key)
        if found is None:
            return None
        return self.name(key, *allowed) if allowed else self.word(key)

    def texts(self, key: str) -> list[str]:
        """A list of strings; an empty one where it is missing or null."""
        found = self._told.get(key)
        if found is None:
            return []
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise self._wrong(key, "a list of names")
        return list(found)

    def part(self, key: str) -> Claims:
        """An object of keys; an empty one where it is missing or null."""
        found = self._told.get(key)
        return self._inner({} if found is None else found, self._inside(key))

    def parts(self) -> Iterator[tuple[str, Claims]]:
        """The objects in this one, by key."""
        for key, value in self._told.items():
            yield key, self._inner(value, self._inside(key))

    def has(self, key: str) -> bool:
        """Whether something else than nothing is said."""
        return self._told.get(key) not in _UNSET

    def refuse(self, *keys: str) -> None:
        """Refuse what would change the weights or what is computed, and is not read here."""
        for key in filter(self.has, keys):
            said = f"`{self._inside(key)}={_short(self._told[key])}` in its `{self._file}`"
            raise Unreadable(f"has {said}, which is not read here")

    def _inner(self, told: object, place: str) -> Claims:
        return Claims(told, place, self._file)

    def _inside(self, key: str) -> str:
        return f"{self._place}.{key}" if self._place else key

    def _wrong(self, key: str, wanted: str) -> Unreadable:
        if key in self._told:
            return Unreadable(self._told_of(self._inside(key), self._told[key], wanted))
        lacking = f"has no `{self._inside(key)}` in its `{self._file}`"
        return Unreadable(f"{lacking}, which should be {wanted}")

    def _told_of(self, place: str, found: object, wanted: str) -> str:
        where = f"`{place}={_short(found)}` in its `{self._file}`" if place else f"a `{self._file}`"
        return f"has {where}, which should be {wanted}"


def _short(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
