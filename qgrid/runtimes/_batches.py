"""How token sequences are grouped for scoring: pure arithmetic, no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CHUNK_ROWS = 512  # the contract: no more rows in one `Scores`
MIN_SHARED = 8  # shorter common beginnings are not worth a second forward pass


@dataclass(frozen=True)
class Request:
    """Sequence number `index`; the distributions of its last `keep` tokens are wanted."""

    index: int
    ids: tuple[int, ...]
    keep: int


@dataclass(frozen=True)
class Family:
    """Requests that begin with the same `stem`, which is computed once for all of them."""

    stem: tuple[int, ...]
    members: tuple[Request, ...]

    @property
    def tokens(self) -> int:
        """Tokens that go through the model: the stem once and every tail."""
        tails = sum(len(member.ids) - 1 - len(self.stem) for member in self.members)
        return len(self.stem) + tails

    @property
    def rows(self) -> int:
        """Distributions that are projected: every member is as wide as the widest."""
        return len(self.members) * max(member.keep for member in self.members)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal leading tokens."""
    for count, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return count
    return min(len(first), len(second))


def within_rows(requests: Sequence[Request], max_rows: int) -> Iterator[list[Request]]:
    """Successive requests whose distributions together stay under `max_rows`."""
    group: list[Request] = []
    rows = 0
    for request in requests:
        if group and rows + request.keep > max_rows:
            yield group
            group, rows = [], 0
        group.append(request)
        rows += request.keep
    if group:
        yield group


def families(requests: Sequence[Request]) -> list[Family]:
    """Neighbours with a long common beginning (the choices of one item) share it."""
    found: list[Family] = []
    for request in requests:
        last = found[-1] if found else None
        joined = _joined(last, request) if last else None
        if joined:
            found[-1] = joined
        else:
            found.append(Family((), (request,)))
    return found


def _joined(family: Family, request: Request) -> Family | None:
    first = family.members[0]
    members = (*family.members, request)
    # The row of a token comes from the token before it: the stem ends where a row is needed.
    free = min(len(member.ids) - member.keep - 1 for member in members)
    known = family.stem if family.stem else first.ids
    shared = min(common_length(known, request.ids), free)
    if shared < MIN_SHARED or 2 * shared < len(request.ids):
        return None
    if family.stem and 4 * shared < 3 * len(family.stem):
        return None  # it would cost the others more than it saves
    return Family(first.ids[:shared], members)


def batches(found: Sequence[Family], max_tokens: int, max_rows: int) -> Iterator[list[Family]]:
    """Families of like length together, so that little is padded; each family stays whole."""
    ordered = sorted(found, key=lambda family: (bool(family.stem), _width(family)))
    batch: list[Family] = []
    for family in ordered:
        trial = [*batch, family]
        fits = _cost(trial) <= max_tokens and sum(each.rows for each in trial) <= max_rows
        alike = not batch or bool(batch[0].stem) == bool(family.stem)
        if batch and not (fits and alike):
            yield batch
            trial = [family]
        batch = trial
    if batch:
        yield batch


def _width(family: Family) -> int:
    return max(len(member.ids) for member in family.members)


def _cost(batch: Sequence[Family]) -> int:
    """Tokens of the padded batch."""
    stem = max(len(family.stem) for family in batch)
    members = [member for family in batch for member in family.members]
    tail = max(len(m.ids) - 1 - len(f.stem) for f in batch for m in f.members)
    return (stem * len(batch) if stem else 0) + tail * len(members)


def runs(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Long requests alone, the short ones between them together."""
    run: list[Request] = []
    for request in requests:
        if request.keep > CHUNK_ROWS:
            if run:
                yield run
            yield [request]
            run = []
        else:
            run.append(request)
    if run:
        yield run


def cuts(inputs: int, keep: int) -> Iterator[int]:
    """How many rows arrive at once where the last `keep` of so many inputs have one."""
    for begin in range(0, inputs, CHUNK_ROWS):
        end = min(begin + CHUNK_ROWS, inputs)
        if (rows := min(end - begin, end - (inputs - keep))) > 0:
            yield rows


def require_rows(request: Request, lead: int) -> None:
    """Refuse a request for more rows than it has tokens with one before them.

    Raises:
        ValueError: the request, and what is allowed.
    """
    longest = len(request.ids) - max(lead, 1)
    if not 1 <= request.keep <= longest:
        raise ValueError(
            f"`keep={request.keep}` of sequence {request.index} should be between 1 and {longest}: "
            "a row needs a token before it"
        )
