"""Which parameters travel together, decided from names and sizes alone: the plan and the run share it. No torch.

Buckets follow the order of backward; otherwise units are modules that are gathered as one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

ALIGNMENT = 16
"""Elements; every parameter starts at a multiple, so that kernels may read vectors."""
LARGE = 0.25
"""A module beside the blocks is a unit of its own if it holds this share of the largest block."""


@dataclass(frozen=True, slots=True)
class Item:
    """One parameter: its first name, its elements, and all names that it has (several when tied)."""

    name: str
    elements: int
    names: tuple[str, ...]


@dataclass(slots=True)
class Group:
    """Parameters of one unit, and the names of the modules whose forward needs them."""

    name: str
    items: list[Item]
    modules: list[str] = field(default_factory=list)
    depth: int = 0
    """Units around it."""
    encloses: bool = False
    """Whether other units run inside its forward."""

    @property
    def elements(self) -> int:
        return sum(item.elements for item in self.items)

    def padded(self, divisor: int) -> int:
        """Elements of its flat buffer, divided into ``divisor`` equal stretches."""
        return aligned(max(sum(aligned(item.elements) for item in self.items), 1), divisor * ALIGNMENT)


def aligned(size: int, unit: int = ALIGNMENT) -> int:
    """``size`` rounded up to a multiple of ``unit``."""
    return -(-size // unit) * unit


def holders(item: Item) -> list[str]:
    """Names of the modules that hold a parameter themselves."""
    return list(dict.fromkeys(parent(name) for name in item.names))


def parent(name: str) -> str:
    """Name of the module around a module or parameter; of the model it is empty."""
    return name.rpartition(".")[0]


def piece(name: str, pieces: Collection[str]) -> str:
    """The module of ``pieces`` that ``name`` is inside of, or ``name``."""
    parts = name.split(".")
    around = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((each for each in around if each in pieces), name)


SHARES = 4
"""Buckets that a model is cut into at least, if they are not smaller than ``LEAST_SHARE``."""

LEAST_SHARE = 4 * 2**20
"""Bytes."""


def buckets(items: Sequence[Item], largest_mb: float, itemsize: int) -> list[Group]:
    """Groups of at most ``largest_mb`` MiB (or one larger parameter), the last registered first, as backward goes.

    Of a model that fills fewer than ``SHARES`` of them each is a share of it instead, so that there is something to
    send while backward and the next forward go on, but not so small that messages cost more than their bytes.
    """
    share = max(sum(item.elements for item in items) * itemsize // SHARES, LEAST_SHARE)
    limit = int(min(largest_mb * 2**20, share) / itemsize)
    groups: list[Group] = []
    for item in reversed(items):
        if not groups or groups[-1].elements + item.elements > limit:
            groups.append(Group(f"bucket {len(groups)}", []))
        groups[-1].items.append(item)
    for group in groups:
        group.modules = list(dict.fromkeys(holder for item in group.items for holder in holders(item)))
    return groups


def by_module(items: Sequence[Item], lists: Collection[str], patterns: Sequence[str] | None, least: int) -> list[Group]:
    """Groups of modules in the order of registration, the model's own rest first; neighbours joined up to ``least``.

    ``lists`` names the model's ModuleLists, whose members are units unless ``patterns`` say which modules are.
    """
    modules = _modules(items)
    chosen = {*_candidates(items, modules, lists, patterns), ""}
    groups = {name: Group(name, [], [name]) for name in modules if name in chosen}
    for item in items:
        around = [name for name in groups if all(_inside(holder, name) for holder in holders(item))]
        groups[max(around, key=len)].items.append(item)
    filled = [group for group in groups.values() if group.items]
    for group in filled:
        group.depth = sum(other is not group and _inside(group.name, other.name) for other in filled)
        group.encloses = any(other is not group and _inside(other.name, group.name) for other in filled)
    return _join(filled, least)


def settle_nesting(groups: Sequence[tuple[Group, Collection[int]]]) -> None:
    """Of groups that were made stage by stage, given with their stages: which have units of another set inside."""
    for group, stages in groups:
        group.encloses = group.encloses or any(
            other is not group and not set(stages).isdisjoint(others) and _inside(other.name, group.name)
            for other, others in groups
        )


def _modules(items: Sequence[Item]) -> list[str]:
    """Names of all modules with parameters inside, parents before children, in the order of their first parameter."""
    found: dict[str, None] = {"": None}
    for item in items:
        for name in item.names:
            words = name.split(".")[:-1]
            found.update(dict.fromkeys(".".join(words[:end]) for end in range(1, len(words) + 1)))
    return list(found)


def _candidates(
    items: Sequence[Item], modules: Iterable[str], lists: Collection[str], patterns: Sequence[str] | None
) -> list[str]:
    if patterns is not None:
        return [name for name in modules if any(matches(name, each) for each in patterns)]
    outermost = [one for one in lists if not any(one != other and _inside(one, other) for other in lists)]
    blocks = [name for name in modules if name and parent(name) in outermost]
    sizes: dict[str, int] = {}
    for item in items:
        for holder in holders(item):
            sizes[holder] = sizes.get(holder, 0) + item.elements
    total = {block: sum(size for name, size in sizes.items() if _inside(name, block)) for block in blocks}
    large = LARGE * max(total.values(), default=0)
    beside = [
        name
        for name, size in sizes.items()
        if name and blocks and size >= large and not any(_inside(name, block) for block in blocks)
    ]
    return blocks + beside


def matches(name: str, pattern: str) -> bool:
    """Level by level, so that a star stands for the members of a list and not for all that is inside of them."""
    words, wanted = name.split("."), pattern.split(".")
    return len(words) == len(wanted) and all(map(fnmatchcase, words, wanted))


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _join(groups: list[Group], least: int) -> list[Group]:
    joined: list[Group] = []
    for group in groups:
        last = joined[-1] if joined else None
        beside = last is not None and parent(last.name) == parent(group.name)
        if last is not None and beside and not (last.encloses or group.encloses) and last.elements < least:
            last.items += group.items
            last.modules += group.modules
        else:
            joined.append(group)
    return joined


def slots(groups: Sequence[Group], prefetch: int, reshard: bool) -> list[object]:
    """Which buffer each group is gathered into: those at one depth alternate, those around others have their own."""
    count = max(2, prefetch + 1)
    counters: dict[int, int] = {}
    keys: list[object] = []
    for index, group in enumerate(groups):
        if group.encloses or not reshard:
            keys.append(("own", index))
        else:
            counters[group.depth] = counters.get(group.depth, -1) + 1
            keys.append((group.depth, counters[group.depth] % count))
    return keys


def kept(groups: Sequence[Group]) -> list[Group]:
    """Units that stay gathered from forward to backward: the last that forward uses, and what is around all others."""
    inner = [group for group in groups if not group.encloses]
    return inner[-1:] + [group for group in groups if group.encloses and not group.depth]
