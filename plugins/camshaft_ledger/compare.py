"""Finding the first call in which ranks differ, and saying which rank is wrong. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from camshaft_ledger.sequence import Entry, Record

Records = Mapping[int, Record]
RULE = "All ranks of a group must make the same calls in the same order"


class Item(NamedTuple):
    """A call, or the end of a step (``entry`` is None); ``number`` counts the step's calls from 1."""

    step: int
    number: int
    entry: Entry | None


class Difference(NamedTuple):
    """Two ranks and what each of them came to in the place of the other's."""

    first: int
    one: Item
    second: int
    other: Item


def diverged(records: Records) -> str | None:
    """What the ranks differ in, in one sentence; None while what they did could still be the same.

    Only calls on groups that two ranks share are compared between them: a rank that is behind is no difference.
    """
    found = [difference for pair in _pairs(records) if (difference := _compare(records, *pair)) is not None]
    if not found:
        return None
    return _describe(records, min(found, key=lambda each: (each.one.step, each.one.number, each.second)))


def _pairs(records: Records) -> Iterator[tuple[int, int]]:
    """Each rank with the first of every group that it is in."""
    seen: set[tuple[int, int]] = set()
    for rank, record in records.items():
        for ranks in record.groups.values():
            first = next((peer for peer in ranks if peer in records), rank)
            if first != rank and (first, rank) not in seen:
                seen.add((first, rank))
                yield first, rank


def _items(record: Record, start: int) -> Iterator[Item]:
    for step, entries in record.steps:
        if step < start:
            continue
        for number, entry in enumerate(entries, start=1):
            yield Item(step, number, entry)
        if step != record.steps[-1][0] or record.ended == "finished":
            yield Item(step, len(entries) + 1, None)


def _compare(records: Records, first: int, second: int) -> Difference | None:
    start = max(records[rank].steps[0][0] for rank in (first, second))
    sides = [
        [item for item in _items(records[rank], start) if item.entry is None or peer in _group(records[rank], item)]
        for rank, peer in ((first, second), (second, first))
    ]
    for one, other in zip(*sides, strict=False):
        if one.entry != other.entry or (one.step != other.step):
            return Difference(first, one, second, other)
    return None


def _group(record: Record, item: Item) -> tuple[int, ...]:
    return record.groups.get(item.entry.axis, ()) if item.entry is not None else ()


def _describe(records: Records, found: Difference) -> str:
    wrong, item, right, expected = found.second, found.other, found.first, found.one
    if _trust(records, found.second, item) > _trust(records, found.first, expected):
        wrong, item, right, expected = right, expected, wrong, item
    return f"{_accuse(records, wrong, item, right, expected)} (step {item.step}). {RULE}"


def _trust(records: Records, rank: int, item: Item) -> tuple[int, bool]:
    """How many ranks did the same as ``rank`` in this place, and whether it did so in a step before."""
    same = sum(item in _items(record, item.step) for record in records.values())
    return same, _usual(records[rank], item, item.entry)


def _usual(record: Record, item: Item, *run: Entry | None) -> bool:
    """Whether, in a step before, these calls followed what comes before ``item``; None is the step's end."""
    earlier = [each.entry for each in _items(record, 0) if each.step < item.step]
    before = [each.entry for each in _items(record, item.step) if each.step == item.step and each.number < item.number]
    wanted = [*before[-1:], *run]
    return any(earlier[place : place + len(wanted)] == wanted for place in range(len(earlier)))


def _accuse(records: Records, wrong: int, item: Item, right: int, expected: Item) -> str:
    if expected.entry is None:
        assert item.entry is not None
        return f"rank {wrong}{_by(item.entry)}: call {_what(item)}; rank {right} {_over(records, right, expected)}"
    if item.entry is None or _left_out(records, item, right, expected):
        went_on = _over(records, wrong, item) if item.entry is None else f"went on to {_name(item)}"
        return (
            f"rank {wrong}{_by(expected.entry)}: left out call {_what(expected)}, which rank {right} did, and {went_on}"
        )
    sized = item.entry._replace(dtype="", elements=0) == expected.entry._replace(dtype="", elements=0)
    did = _what(expected, sized=sized, number=False)
    whose = "" if item.entry[:2] == expected.entry[:2] else f" ({_by(expected.entry).lstrip(', ')})"
    return f"rank {wrong}{_by(item.entry)}: call {_what(item, sized=sized)}; rank {right} did {did}{whose}"


def _left_out(records: Records, item: Item, right: int, expected: Item) -> bool:
    """Whether ``item`` is what comes after ``expected``: on the other rank, or in a step before."""
    following = (each for each in _items(records[right], expected.step) if each.number == expected.number + 1)
    after = next(following, None)
    if after is not None and after.entry == item.entry:
        return True
    return _usual(records[right], expected, expected.entry, item.entry)


def _over(records: Records, rank: int, item: Item) -> str:
    record = records[rank]
    last = record.ended == "finished" and item.step == record.steps[-1][0]
    return "has ended its run" if last else f"has finished step {item.step}"


def _by(entry: Entry) -> str:
    source = ", a library" if entry.plugin == "library" else f", plugin {entry.plugin}"
    return f"{source}, hook {entry.hook}" if entry.hook else source


def _what(item: Item, *, sized: bool = False, number: bool = True) -> str:
    entry = item.entry
    assert entry is not None
    size = f" of {entry.elements} {entry.dtype}" if sized else ""
    return f"{f'{item.number} ' if number else ''}{entry.op}{size} on {entry.axis}"


def _name(item: Item) -> str:
    assert item.entry is not None
    return f"call {_what(item)} of {_by(item.entry).removeprefix(', ')}"
