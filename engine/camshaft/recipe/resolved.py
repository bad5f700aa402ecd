"""From a path and overrides to one frozen recipe, of which every value knows who set it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from camshaft.errors import Problem, RecipeError
from camshaft.recipe import checks, emit
from camshaft.recipe.interpolate import interpolate
from camshaft.recipe.merge import read_with_bases
from camshaft.recipe.nodes import SCHEMA_DEFAULT, Node, Origin, join, locate
from camshaft.recipe.overrides import apply
from camshaft.recipe.schema import Recipe
from camshaft.recipe.validate import PLUGINS, Validated, validate


@dataclass(frozen=True)
class Resolved:
    """A recipe after bases, overrides and defaults.

    ``tree`` is what files and overrides gave, as plain data; ``provenance`` maps the dotted key of every value,
    defaults included, to who set it; ``derived`` maps keys that follow from others to (value, how).
    Paths in the recipe are relative to ``base_dir``, the folder of the recipe that was named.
    """

    recipe: Recipe
    path: Path
    base_dir: Path
    provenance: Mapping[str, Origin]
    tree: Mapping[str, Any]
    derived: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    root: Node = field(default_factory=lambda: Node({}, SCHEMA_DEFAULT), repr=False, compare=False)

    def problem(self, key: str, message: str, fix: str = "") -> Problem:
        """A problem at ``key``, with the file and line of the key or of its nearest ancestor that is set."""
        return self.placed(Problem(message, key=key, fix=fix))

    def placed(self, problem: Problem) -> Problem:
        """``problem`` with the place of its key, unless it has one."""
        return locate(self.root, problem.key).place(problem)

    def values(self) -> dict[str, Any]:
        """Every value of the recipe, defaults included, as plain nested data in the schema's order."""
        values = self.recipe.model_dump(mode="json", exclude={PLUGINS})
        sections = self.recipe.plugins.items()
        values[PLUGINS] = {name: options.model_dump(mode="json", by_alias=True) for name, options in sections}
        return values

    def dump(self) -> str:
        """The text of ``resolved.yaml``: a recipe again, with who set each value as comments."""
        notes = {key: f"{how}: {emit.flow(value)}" for key, (value, how) in self.derived.items()}
        head = "# Resolved by camshaft: every value, and who set it.\n"
        return head + emit.emit(self.values(), self.provenance, notes)


def load(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, world_size: int | None = None) -> Resolved:
    """Read, merge and validate a recipe. Imports no torch, and no plugin but those that the recipe names.

    ``overrides`` are texts ``a.b.c=value``; ``world_size`` lets derived values be shown.

    Raises:
        RecipeError: with every problem of the recipe, its bases, the overrides and the plugins' sections.
    """
    path = Path(path)
    document = read_with_bases(path)
    apply(document, overrides)
    interpolate(document, os.environ)
    validated = validate(document)
    resolved = _resolved(path, document.root, validated)
    if validated.problems:
        more = checks.check(resolved, world_size, sound=validated.sound).problems
        told = {problem.key for problem in validated.problems}
        raise RecipeError([*validated.problems, *(problem for problem in more if problem.key not in told)])
    return replace(resolved, derived=checks.derived(resolved.recipe, world_size))


def _resolved(path: Path, root: Node, validated: Validated) -> Resolved:
    resolved = Resolved(validated.recipe, path, path.resolve().parent, {}, validated.tree, root=root)
    return replace(resolved, provenance=dict(_origins(resolved.values(), "", root)))


def _origins(value: Any, key: str, node: Node | None) -> list[tuple[str, Origin]]:
    """(key, origin) of every leaf of ``value``; containers that are empty or lists count as leaves too."""
    found = [] if isinstance(value, dict) and value else [(key, _default(key) if node is None else node.origin)]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        found += _origins(child, join(key, name), None if node is None else node.get(str(name)))
    return found


def _default(key: str) -> Origin:
    parts = key.split(".")
    if parts[0] == PLUGINS and len(parts) > 1:
        return Origin("default", f"default of plugin '{parts[1]}'")
    return SCHEMA_DEFAULT
