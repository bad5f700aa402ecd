"""``extends:``: bases merged left to right, the file itself on top of them."""

from __future__ import annotations

import os
from pathlib import Path

from camshaft.errors import Problem, RecipeError
from camshaft.recipe import secrets
from camshaft.recipe.nodes import Document, Node, join
from camshaft.recipe.reader import read_file

KEY = "extends"
MAX_FILES = 64
WHOLE = frozenset({"data.train", "data.validation", "model.rope_scaling"})
"""Mappings of which several forms exist: merging would mix two forms, so that the upper one replaces the lower."""


def merge(base: Node, top: Node, prefix: str = "") -> Node:
    """``top`` on ``base``. Mappings merge, with the base's order first; scalars, lists and null replace."""
    if prefix in WHOLE or not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    merged = dict(base.value)
    for key, node in top.value.items():
        merged[key] = merge(merged[key], node, join(prefix, key)) if key in merged else node
    return Node(merged, top.origin, bad=base.bad or top.bad)


def read_with_bases(path: Path) -> Document:
    """Read a recipe and all that it extends; the result holds the faults of all files.

    Raises:
        RecipeError: the recipe itself cannot be read or parsed.
    """
    return _Chain().read(path, os.fspath(path), ())


class _Chain:
    """Reads one recipe and its bases. ``files`` counts them: bases of bases could otherwise double without end."""

    def __init__(self) -> None:
        self.files = 0

    def read(self, path: Path, shown: str, above: tuple[Path, ...]) -> Document:
        """The document at ``path`` on top of its bases; ``above`` are the recipes that extend it."""
        self.files += 1
        document = read_file(path, shown)
        secrets.check(document)
        assert isinstance(document.root.value, dict)
        entry = document.root.value.pop(KEY, None)
        base: Node | None = None
        for node in [] if entry is None else _entries(document, entry):
            found = self._base(document, node, path, (*above, path.resolve()))
            if found is not None:
                base = found if base is None else merge(base, found)
        if base is not None:
            document.root = merge(base, document.root)
        return document

    def _base(self, document: Document, node: Node, path: Path, above: tuple[Path, ...]) -> Node | None:
        """Read one base, add its faults to ``document`` and return its tree, or None if it has none."""
        assert isinstance(node.value, str)
        target = path.parent / node.value
        shown = os.path.normpath(target)
        if target.resolve() in above:
            loop = " -> ".join(step.name for step in (*above, target.resolve()))
            document.refuse(node, KEY, f"a cycle of extends: {loop}", "remove one of the extends")
        elif self.files >= MAX_FILES:
            document.refuse(node, KEY, f"more than {MAX_FILES} recipes are read for this one", "extend fewer recipes")
        elif not target.is_file():
            document.refuse(node, KEY, f"there is no file '{shown}'", "paths start at the folder of this recipe")
        else:
            return self._take(document, target, shown, above)
        return None

    def _take(self, document: Document, target: Path, shown: str, above: tuple[Path, ...]) -> Node | None:
        try:
            found = self.read(target, shown, above)
        except RecipeError as error:
            _add(document, error.problems)
            return None
        _add(document, tuple(found.problems))
        return found.root


def _entries(document: Document, entry: Node) -> list[Node]:
    """The nodes that name a base each; what is no text is reported."""
    entries = entry.value if isinstance(entry.value, list) else [entry]
    for node in entries:
        if not node.bad and not (isinstance(node.value, str) and node.value):
            document.refuse(node, KEY, "must be the path of a recipe, or a list of paths", "extends: base.yaml")
    return [node for node in entries if not node.bad]


def _add(document: Document, problems: tuple[Problem, ...]) -> None:
    """Two bases may share a base: its faults are told once."""
    document.problems = list(dict.fromkeys([*document.problems, *problems]))
