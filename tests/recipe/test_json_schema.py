"""The JSON Schema for editors: draft 7, complete, and of one mind with the loader."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recipe_plugins
import yaml
from recipe_cases import recipe

from camshaft import host
from camshaft.cli import run
from camshaft.recipe.faults import keys_of
from camshaft.recipe.json_schema import build
from camshaft.recipe.schema import Recipe

TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int,
    "number": (int, float),
}  # fmt: skip
KEYWORDS = {
    "$schema", "$id", "$ref", "title", "description", "default", "definitions", "type", "properties", "required",
    "additionalProperties", "anyOf", "oneOf", "allOf", "items", "additionalItems", "minItems", "maxItems", "enum",
    "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern", "minLength", "maxLength",
}  # fmt: skip


def valid(value: Any, schema: Any, root: Any) -> bool:
    """A small validator for exactly the keywords above (https://json-schema.org/draft-07)."""
    if isinstance(schema, bool):
        return schema
    assert set(schema) <= KEYWORDS, set(schema) - KEYWORDS
    if "$ref" in schema:
        assert set(schema) == {"$ref"}, "in draft 7 a $ref hides its neighbours"
        return valid(value, root["definitions"][schema["$ref"].removeprefix("#/definitions/")], root)
    return all(check(value, schema, root) for check in (_kind, _combined, _object, _array, _scalar))


def _kind(value: Any, schema: Any, root: Any) -> bool:
    wanted = schema.get("type", list(TYPES))
    names = wanted if isinstance(wanted, list) else [wanted]
    return any(
        isinstance(value, TYPES[name]) and not (isinstance(value, bool) and name in ("integer", "number"))
        for name in names
    )


def _combined(value: Any, schema: Any, root: Any) -> bool:
    return (
        all(valid(value, part, root) for part in schema.get("allOf", ()))
        and any(valid(value, part, root) for part in schema.get("anyOf", [True]))
        and sum(valid(value, part, root) for part in schema.get("oneOf", [True])) == 1
    )


def _object(value: Any, schema: Any, root: Any) -> bool:
    if not isinstance(value, dict):
        return True
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    return all(valid(item, known.get(key, rest), root) for key, item in value.items()) and (
        set(schema.get("required", ())) <= set(value)
    )


def _array(value: Any, schema: Any, root: Any) -> bool:
    if not isinstance(value, list):
        return True
    items = schema.get("items", True)
    each = [items] * len(value) if not isinstance(items, list) else items
    long_enough = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1 << 30)
    return long_enough and all(valid(item, part, root) for item, part in zip(value, each, strict=False))


def _scalar(value: Any, schema: Any, root: Any) -> bool:
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    low, high = schema.get("minimum", -1e99), schema.get("maximum", 1e99)
    above, below = schema.get("exclusiveMinimum", -1e99), schema.get("exclusiveMaximum", 1e99)
    return low <= value <= high and above < value < below


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return build()


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every dict inside a schema."""
    if isinstance(schema, dict):
        yield schema
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from parts(inner)


def test_draft_and_references(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    references = {part["$ref"] for part in parts(schema) if isinstance(part.get("$ref"), str)}
    assert references
    assert {name.removeprefix("#/definitions/") for name in references} <= set(schema["definitions"])
    assert not any(key in part for part in parts(schema) for key in ("$defs", "prefixItems"))
    assert all(re.fullmatch(r"#/definitions/[\w.]+", name) for name in references), "a $ref is a URI"


def test_every_section_and_plugin_is_there(schema: dict[str, Any]) -> None:
    assert set(schema["properties"]) == {*Recipe.model_fields, "extends"}
    plugins = schema["properties"]["plugins"]
    assert set(plugins["properties"]) == set(host.installed())
    assert plugins["additionalProperties"] is False
    for name in host.installed():
        section = schema["definitions"][f"plugins.{name}"]
        assert set(section.get("properties", {})) == set(keys_of(host.plugin_class(name).Options))
        assert section["additionalProperties"] is False


def test_docstrings_are_descriptions(schema: dict[str, Any]) -> None:
    data = schema["definitions"]["Data"]
    assert data["properties"]["sequence_length"]["description"] == "Tokens of one sample."
    assert data["description"] == "What the model reads."


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"plugins": "plugins: {adamw: {lr: 1e-3, betas: [0.9, 0.95]}, ddp: null, clip: {max_norm: 1}}"},
        {"training": "training: {max_steps: '${env:STEPS}'}"},
        {"extends": "extends: base.yaml", "batch": ""},
        {"extends": "extends: [a.yaml, b.yaml]", "name": ""},
        {"data": "data: {train: {files: [a.txt]}, validation: {blend: [{prefix: a, weight: 2}]}}"},
        {"parallel": "parallel: {data_parallel: 2}"},
        {"parallel": "parallel: {data_parallel: auto}"},
    ],
    ids=str,
)
def test_accepts_what_the_loader_accepts(schema: dict[str, Any], changes: dict[str, str]) -> None:
    assert valid(yaml.safe_load(recipe(**changes).replace("1e-3", "0.001")), schema, schema)


@pytest.mark.parametrize(
    "changes",
    [
        {"trainings": "trainings: {}"},
        {"batch": ""},
        {"batch": "batch: {micro_batch_size: 2}"},
        {"training": "training: {max_setps: 5}"},
        {"training": "training: {max_steps: many}"},
        {"training": "training: {max_steps: 0}"},
        {"training": "training: {max_steps: 0.5}"},
        {"plugins": "plugins: {adamw: {lr: 0.1, weigth_decay: 1}}"},
        {"plugins": "plugins: {adamv: {}}"},
        {"plugins": "plugins: {adamw: {lr: 1, betas: [0.9, x]}}"},
        {"name": "name: ../up"},
        {"data": "data: {train: python-doc}"},
        {"parallel": "parallel: {data_parallel: aut}"},
    ],
    ids=str,
)
def test_refuses_what_the_loader_refuses(schema: dict[str, Any], changes: dict[str, str]) -> None:
    assert not valid(yaml.safe_load(recipe(**changes).replace("1e-3", "0.001")), schema, schema)


def test_shipped_recipes_are_valid(schema: dict[str, Any]) -> None:
    found = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert found
    for path in found:
        text = re.sub(r"\b(\d+)e-(\d)", r"\1.0e-\2", path.read_text())
        assert valid(yaml.safe_load(text), schema, schema), path.name


def test_models_inside_options_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_plugins.install(monkeypatch)
    schema = build()
    assert "plugins.fancy.Inner" in schema["definitions"]
    text = "plugins: {fancy: {required_text: a, inner: {%s: 1}, pair: [1, 2]}}"
    good, bad = (yaml.safe_load(recipe(plugins=text % key).replace("1e-3", "0.001")) for key in ("ratio", "rato"))
    assert valid(good, schema, schema)
    assert not valid(bad, schema, schema)


def test_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schema.json"
    assert run(["schema", "--output", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text()) == build()
    assert run(["schema", "--output", str(tmp_path / "no" / "folder.json")]) == 3
