"""``camshaft explain``: every value of a recipe, and who set it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from camshaft.cli.console import RecipeArgument, WorldSizeOption, table
from camshaft.errors import RecipeError
from camshaft.recipe import Resolved, load
from camshaft.recipe.emit import flow
from camshaft.recipe.nodes import join
from camshaft.recipe.suggest import nearest

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY] [KEY=VALUE]...", help="A key or section to show; overrides.", show_default=False),
]


def register(app: typer.Typer) -> None:
    app.command("explain")(explain)


def explain(recipe: RecipeArgument, words: Words = None, world_size: WorldSizeOption = None) -> None:
    """Show the values of a recipe, and who set each: a line of a file, an override, or a default."""
    overrides = [word for word in words or () if "=" in word]
    keys = [word for word in words or () if "=" not in word]
    resolved = load(recipe, overrides, world_size=world_size)
    rows = _rows(resolved)
    wanted = [row for key in keys for row in _below(key, rows, resolved)] if keys else rows
    table(("KEY", "VALUE", "SET BY"), wanted)


def _rows(resolved: Resolved) -> list[tuple[str, str, str]]:
    rows = []
    architecture = _architecture(resolved)
    for key, value in _leaves(resolved.values(), ""):
        origin = str(resolved.provenance[key])
        if key in resolved.derived:
            value, origin = resolved.derived[key]
        elif value is None and key in architecture:
            value, origin = architecture[key]
        rows.append((key, flow(value), origin))
    return rows


def _architecture(resolved: Resolved) -> dict[str, tuple[Any, str]]:
    """Key to (value, who) of the model's fields that the recipe leaves open; empty where the model has a fault."""
    from camshaft import data
    from camshaft.models.config import resolve
    from camshaft.models.presets import PRESETS

    model = resolved.recipe.model
    try:
        config = resolve(model, data.vocab_size(resolved))
    except RecipeError:
        return {}
    preset = PRESETS[model.preset].model_dump(exclude_none=True) if model.preset else {}
    found = {}
    for name in type(model).model_fields.keys() - {"preset", "rope_scaling"}:
        derived = "size of the tokenizer" if name == "vocab_size" else "derived, or default of the architecture"
        found[f"model.{name}"] = (getattr(config, name), f"preset '{model.preset}'" if name in preset else derived)
    if config.rope_scaling is not None:
        found["model.rope_scaling"] = (config.rope_scaling.as_dict(), f"preset '{model.preset}'")
    return found


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Scalars and lists; a mapping without keys is a value too."""
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from _leaves(child, join(key, name))
    else:
        yield key, value


def _below(key: str, rows: list[tuple[str, str, str]], resolved: Resolved) -> list[tuple[str, str, str]]:
    """Rows of ``key`` itself or below it.

    Raises:
        RecipeError: there is no such key.
    """
    found = [row for row in rows if row[0] == key or row[0].startswith(f"{key}.")]
    if found:
        return found
    known = {row[0].rsplit(".", depth)[0] for row in rows for depth in range(row[0].count(".") + 1)}
    same_name = [name for name in sorted(known) if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name[0] if same_name else nearest(key, sorted(known))
    message = f"the recipe has no key '{key}'" + (f". Did you mean '{near}'?" if near else "")
    raise RecipeError(resolved.problem("", message, fix="camshaft explain without a key lists all"))
