"""A recipe between file and schema: a tree in which every value still knows who set it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from camshaft.errors import Problem

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Who set a value: a line of a file, an override, a default or a derivation."""

    kind: Literal["file", "override", "default", "derived"]
    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"

    def place(self, problem: Problem) -> Problem:
        """``problem`` with this origin as its place, where a user can go and change something."""
        if problem.file or self.kind not in ("file", "override"):
            return problem
        return replace(problem, file=self.source, line=self.line)


SCHEMA_DEFAULT = Origin("default", "default of the schema")


@dataclass(slots=True)
class Node:
    """One value of the tree. ``plain`` marks an unquoted scalar, ``bad`` one with a fault that is already reported."""

    value: Scalar | dict[str, Node] | list[Node]
    origin: Origin
    plain: bool = False
    bad: bool = False

    def children(self) -> Iterator[tuple[str, Node]]:
        """(key or index, node) of a mapping or list; nothing for a scalar."""
        if isinstance(self.value, dict):
            yield from self.value.items()
        elif isinstance(self.value, list):
            yield from ((str(index), node) for index, node in enumerate(self.value))

    def get(self, key: str) -> Node | None:
        """The child called ``key``, or None."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and key.isdecimal() and int(key) < len(self.value):
            return self.value[int(key)]
        return None


@dataclass(slots=True)
class Document:
    """A tree and the faults found on the way to it."""

    root: Node
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, node: Node, key: str, message: str, fix: str = "") -> None:
        """Report a fault at ``node`` and mark it, so that nothing later reports its value again."""
        node.bad = True
        self.problems.append(node.origin.place(Problem(message, key=key, fix=fix)))


def join(prefix: str, key: str | int) -> str:
    """Dotted key of a child."""
    return f"{prefix}.{key}" if prefix else str(key)


def walk(node: Node, prefix: str = "") -> Iterator[tuple[str, Node]]:
    """Every node below ``node`` with its dotted key, parents first."""
    for key, child in node.children():
        path = join(prefix, key)
        yield path, child
        yield from walk(child, path)


def plain(node: Node) -> Any:
    """The tree as plain dicts, lists and scalars. Bad values are left out."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items() if not child.bad}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value if not child.bad]
    return node.value


def locate(root: Node, key: str) -> Origin:
    """Origin of ``key``, or of its nearest ancestor that is set. A key of a mapping may have dots in it."""
    node, parts = root, key.split(".") if key else []
    while parts:
        taken = next((count for count in range(1, len(parts) + 1) if node.get(".".join(parts[:count]))), None)
        if taken is None:
            break
        child = node.get(".".join(parts[:taken]))
        assert child is not None
        node, parts = child, parts[taken:]
    return node.origin


def show(value: Any) -> str:
    """A value in an error message: scalars as YAML would write them, cut; containers by kind only."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def show_key(key: Any) -> str:
    """A key in an error message: never long, never more than one line."""
    text = str(key).encode("unicode_escape").decode("ascii")
    return text if len(text) <= 60 else f"{text[:57]}..."
