"""``docs/recipe.md``: every key of a recipe, from the schema and from each shipped plugin's ``Options``."""

from __future__ import annotations

import inspect

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from camshaft.models.config import resolve
from camshaft.models.presets import PRESETS
from camshaft.recipe.faults import keys_of
from camshaft.recipe.schema import Model, Recipe
from tools.docs import types
from tools.docs.inventory import plugins

EXAMPLE_VOCABULARY = 1024
HEAD = """<!-- Generated from engine/camshaft/recipe/schema.py and the plugins' Options by `make docs`. Do not edit. -->

# Recipe reference

A recipe is one YAML file. Scalars follow YAML 1.2 (`1e-4` is a number, `no` is text, `010` is 10), keys may not repeat,
and an unknown key is an error with file, line and the nearest known key. `camshaft validate RECIPE` finds all faults of
a recipe at once; `camshaft explain RECIPE key` says what a value is and who set it; `camshaft schema` writes a JSON
Schema for editors, third-party plugins included.

- **Bases.** `extends: base.yaml` (or a list, left to right) starts from other recipes. `null` removes what a base set,
  for example a plugin: `plugins: {wandb: null}`.
- **Overrides.** `camshaft train RECIPE training.max_steps=50 plugins.adamw.lr=1e-3` changes single values. Precedence:
  base, then file, then override.
- **Environment.** `${env:NAME}` in a value is replaced by that environment variable,
  `${env:NAME:-text}` by `text` where it is not set. Nothing else is interpolated.
- **Paths** start at the folder of the recipe, unless a key says otherwise.
"""

PLUGINS = """
## plugins

Plugin name to its options, in the order in which plugins take effect. Only plugins named here are imported. Installed
ones of other packages are used in the same way; `camshaft plugins` lists them all."""


def page() -> str:
    """The whole page."""
    lines = [HEAD, *_table(Recipe, "", "Top level")]
    for name, field in Recipe.model_fields.items():
        for block in types.blocks(field.annotation):
            lines += [*_table(block, name, name), *_nested(block, name, 3, set())]
        lines += _presets() if name == "model" else []
    lines.append(PLUGINS)
    for shipped in plugins():
        lines += ["", f"### plugins.{shipped.name}", "", f"{shipped.summary}."]
        lines += _rows(shipped.plugin.Options, f"plugins.{shipped.name}")
        lines += _nested(shipped.plugin.Options, f"plugins.{shipped.name}", 4, set())
    return "\n".join(lines) + "\n"


def _presets() -> list[str]:
    """Shipped architectures with their size; those without a vocabulary of their own take the tokenizer's."""
    lines = ["", "### model.preset", "", "| preset | parameters | vocabulary |", "|---|---:|---:|"]
    for name, preset in PRESETS.items():
        size = resolve(Model(preset=name), preset.vocab_size or EXAMPLE_VOCABULARY).num_parameters()
        vocabulary = f"{preset.vocab_size:,}" if preset.vocab_size else "the tokenizer's"
        lines.append(f"| `{name}` | {size:,} | {vocabulary} |")
    return [*lines, "", f"Where the vocabulary is the tokenizer's, sizes are with {EXAMPLE_VOCABULARY:,} entries."]


def _nested(block: type[BaseModel], key: str, level: int, seen: set[type[BaseModel]]) -> list[str]:
    """Tables of the blocks inside a block, each class once."""
    lines: list[str] = []
    for name, field in keys_of(block).items():
        for inner in types.blocks(field.annotation):
            if inner not in seen:
                seen.add(inner)
                lines += _table(inner, f"{key}.{name}", f"{key}.{name}: {inner.__name__}", level)
                lines += _nested(inner, f"{key}.{name}", level + 1, seen)
    return lines


def _table(block: type[BaseModel], key: str, title: str, level: int = 2) -> list[str]:
    about = inspect.getdoc(block) or ""
    return ["", f"{'#' * level} {title}", "", about.replace("``", "`"), *_rows(block, key)]


def _rows(block: type[BaseModel], key: str) -> list[str]:
    if not block.model_fields:
        return ["", "No options."]
    lines = ["", "| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in keys_of(block).items():
        full = f"{key}.{name}" if key else name
        lines.append(f"| `{full}` | {types.field_type(field)} | {types.default(field)} | {_meaning(field)} |")
    return lines


def _meaning(field: FieldInfo) -> str:
    """The field's docstring; of a block without one the first line of the block's own."""
    inner = types.blocks(field.annotation)
    text = field.description or (inspect.getdoc(inner[0]) or "" if inner else "")
    return " ".join(text.split()).replace("|", "\\|").replace("``", "`")
