"""One JSON Schema (draft 7) for editors, made of the core's schema and of every installed plugin's options."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from camshaft import host
from camshaft.recipe.merge import KEY as EXTENDS
from camshaft.recipe.schema import Recipe

DRAFT = "http://json-schema.org/draft-07/schema#"
ENVIRONMENT = "FromEnvironment"
_DATA = frozenset({"const", "default", "enum", "examples", "required"})
_SCALARS = frozenset({"integer", "number", "boolean"})


def build() -> dict[str, Any]:
    """The schema of a recipe file. Imports every installed plugin.

    Raises:
        PluginError: an installed plugin cannot be imported.
    """
    definitions: dict[str, Any] = {}
    root = _schema_of(Recipe, "", definitions)
    root["properties"]["plugins"] = _plugins(definitions)
    root["properties"][EXTENDS] = {
        "description": "Recipes that this one starts from, relative to this file; later ones win.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    # With bases, a required key may come from one of them.
    required = root.pop("required", [])
    root["anyOf"] = [{"required": required}, {"required": [EXTENDS]}]
    definitions[ENVIRONMENT] = {"type": "string", "pattern": r"^\$\{env:"}
    return {"$schema": DRAFT, "$id": "camshaft-recipe", **root, "title": "Camshaft recipe", "definitions": definitions}


def _plugins(definitions: dict[str, Any]) -> dict[str, Any]:
    properties = {}
    for name in host.installed():
        loaded = host.plugin_class(name)
        definitions[f"plugins.{name}"] = _schema_of(loaded.Options, f"plugins.{name}.", definitions)
        section: dict[str, Any] = {"anyOf": [{"$ref": f"#/definitions/plugins.{name}"}, {"type": "null"}]}
        if about := (loaded.__doc__ or "").strip():
            section["description"] = about
        properties[name] = section
    return {
        "description": "Plugin name to its options, in the order in which they take effect; null switches one off.",
        "type": ["object", "null"],
        "properties": properties,
        "additionalProperties": False,
    }


def _schema_of(model: type[BaseModel], prefix: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Schema of one model; the models inside it go to ``definitions``, under names of their own."""
    schema = model.model_json_schema(ref_template=f"#/definitions/{prefix}{{model}}")
    for name, inner in schema.pop("$defs", {}).items():
        definitions[f"{prefix}{name}"] = _draft7(inner)
    converted: dict[str, Any] = _draft7(schema)
    return converted


def _draft7(schema: Any) -> Any:
    """Pydantic writes draft 2020-12: tuples are spelt otherwise in draft 7, and ``$ref`` hides its neighbours there.

    Where a number or a switch is wanted, ``${env:NAME}`` is allowed as well.
    """
    if isinstance(schema, list):
        return [_draft7(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _keyword(key, value) for key, value in schema.items()}
    if "prefixItems" in found:
        found["items"] = found.pop("prefixItems")
        found["additionalItems"] = False
    if "$ref" in found and len(found) > 1:
        found["allOf"] = [{"$ref": found.pop("$ref")}]
    return _or_environment(found)


def _keyword(name: str, value: Any) -> Any:
    """Convert what is a schema; the values of some keywords are data or names."""
    if name in _DATA:
        return value
    if name == "properties":
        return {key: _draft7(inner) for key, inner in value.items()}
    return _draft7(value)


def _or_environment(schema: dict[str, Any]) -> dict[str, Any]:
    if not (isinstance(schema.get("type"), str) and schema["type"] in _SCALARS):
        return schema
    outside: dict[str, Any] = {key: schema.pop(key) for key in ("title", "description", "default") if key in schema}
    return {**outside, "anyOf": [schema, {"$ref": f"#/definitions/{ENVIRONMENT}"}]}
