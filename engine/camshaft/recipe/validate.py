"""A merged tree to typed sections: the core's by the schema, each plugin's by the options class of its plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from camshaft import host
from camshaft.errors import Problem
from camshaft.plugin import Options
from camshaft.recipe import faults
from camshaft.recipe.nodes import Document, Node, join, locate, plain, show, show_key
from camshaft.recipe.schema import Recipe
from camshaft.recipe.suggest import distance, nearest

PLUGINS = "plugins"
_STAND_IN: Mapping[str, Any] = {
    "schema_version": 1,
    "name": "unnamed",
    "batch": {"micro_batch_size": 1, "global_batch_size": 1},
}


@dataclass(slots=True)
class Validated:
    """The typed recipe, and which of its sections can be believed.

    With ``problems``, sections that are not ``sound`` hold defaults: further checks may still read the others.
    """

    recipe: Recipe
    tree: dict[str, Any]
    sound: frozenset[str]
    problems: list[Problem] = field(default_factory=list)


def validate(document: Document) -> Validated:
    """Check ``document`` against the schema and its plugins' options; ``null`` plugins are switched off first.

    Only plugins that are installed and named in the recipe are imported.
    """
    problems = list(document.problems)
    sections, named = _plugin_sections(document, problems)
    tree: dict[str, Any] = plain(document.root)
    core = {key: value for key, value in tree.items() if key != PLUGINS}
    tree = {**core, PLUGINS: {name: plain(node) or {} for name, node in sections.items()}}
    models = {name: host.plugin_class(name).Options for name in named}
    options = _options(tree[PLUGINS], models, sections, problems)
    recipe, failed = _core(core, models, problems)
    failed |= {problem.key.split(".")[0] for problem in document.problems}
    if len(options) < len(sections) or not isinstance(plain(document.root).get(PLUGINS, {}), dict | None):
        failed.add(PLUGINS)
    problems = [_place(document.root, problem) for problem in _without_echoes(problems, document)]
    return Validated(
        recipe.model_copy(update={PLUGINS: options}), tree, frozenset(Recipe.model_fields) - failed, problems
    )


def _plugin_sections(document: Document, problems: list[Problem]) -> tuple[dict[str, Node], list[str]]:
    """Sections of plugins that are switched on, and the names among them that are installed."""
    parent = document.root.get(PLUGINS)
    if parent is None or parent.value is None or parent.bad:
        return {}, []
    if not isinstance(parent.value, dict):
        message = f"must be a mapping of plugins to their options, got {show(parent.value)}"
        line = ": ".join(host.usual("optimizer") or ("name", "{}"))
        problems.append(Problem(message, key=PLUGINS, fix=f"write '{line}' under it, a line for each plugin"))
        return {}, []
    installed = host.installed()
    named = [name for name, node in parent.value.items() if not node.bad]
    problems += [_unknown(name, installed) for name in named if name not in installed]
    on = {name: node for name, node in parent.value.items() if node.value is not None or node.bad}
    return on, [name for name in on if name in installed]


def _unknown(name: str, installed: Mapping[str, Any]) -> Problem:
    key, near = join(PLUGINS, name), nearest(name, installed)
    message = f"no plugin called '{show_key(name)}' is installed"
    if near:
        return Problem(f"{message}. Did you mean '{near}'?", key=key, fix=f"use '{near}'")
    return Problem(
        f"{message} (installed: {', '.join(installed)})",
        key=key,
        fix="install a package that offers it, or remove the line",
    )


def _options(
    tree: Mapping[str, Any], models: Mapping[str, type[Options]], nodes: Mapping[str, Node], problems: list[Problem]
) -> dict[str, Any]:
    """Each plugin's options object; plugins whose section is faulty are left out."""
    found: dict[str, Any] = {}
    for name, model in models.items():
        key, value = join(PLUGINS, name), tree[name]
        if not isinstance(nodes[name].value, dict):
            if not nodes[name].bad:
                message = f"must be a mapping of the plugin's options, got {show(nodes[name].value)}"
                fix = f"write '{name}: {{}}' for the defaults, or null to switch it off"
                problems.append(Problem(message, key=key, fix=fix))
            continue
        try:
            found[name] = model.model_validate_json(json.dumps(value))
        except ValidationError as error:
            problems += faults.problems(error, value, model, key, _Elsewhere(models))
    return found


def _core(
    tree: dict[str, Any], models: Mapping[str, type[Options]], problems: list[Problem]
) -> tuple[Recipe, set[str]]:
    """The recipe without plugins; sections that do not validate are replaced by defaults and returned."""
    try:
        return Recipe.model_validate_json(json.dumps(tree)), set()
    except ValidationError as error:
        problems += faults.problems(error, tree, Recipe, "", _Elsewhere(models))
        failed = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
    sound = {key: value for key, value in tree.items() if key not in failed}
    missing = {key: value for key, value in _STAND_IN.items() if key not in sound}
    return Recipe.model_validate_json(json.dumps({**sound, **missing})), failed


class _Elsewhere:
    """Finds the section that an unknown key belongs to."""

    def __init__(self, plugins: Mapping[str, type[Options]]) -> None:
        self.sections: dict[str, type[BaseModel]] = {"": Recipe}
        for name in Recipe.model_fields:
            for model in faults.models_at(Recipe, [name]):
                self.sections[name] = model
        for name, options in plugins.items():
            self.sections[join(PLUGINS, name)] = options

    def __call__(self, key: str, section: str, value: Any) -> str | None:
        """``value`` tells a plugin's section, a mapping, from a core section's key that is called the same."""
        plugin = not section and key in host.installed()
        if plugin and (isinstance(value, dict) or not any(key in faults.keys_of(each) for each in self._core())):
            return join(PLUGINS, key)
        others = {name: model for name, model in self.sections.items() if name != section}
        for name, model in others.items():
            if key in faults.keys_of(model):
                return join(name, key)
        for name, model in others.items():
            for known in faults.keys_of(model):
                limit = len(known) // 6
                if abs(len(known) - len(key)) <= limit and distance(key, known) <= limit:
                    return join(name, known)
        return None

    def _core(self) -> list[type[BaseModel]]:
        return [model for name, model in self.sections.items() if not name.startswith(f"{PLUGINS}.")]


def _without_echoes(problems: list[Problem], document: Document) -> list[Problem]:
    """Drop what the schema says about keys whose fault the reader has already told, and repetitions."""
    told = {problem.key for problem in document.problems if problem.key}
    told |= {key.rpartition(".")[0] for key in told if key.rpartition(".")[2].isdecimal()}  # lists lack what was bad
    fresh = problems[len(document.problems) :]
    return list(dict.fromkeys([*document.problems, *(problem for problem in fresh if problem.key not in told)]))


def _place(root: Node, problem: Problem) -> Problem:
    return locate(root, problem.key).place(problem)
