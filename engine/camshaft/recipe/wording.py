"""What a message says about a value that is wrong: what it must be, what was got, what to write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from camshaft.recipe import scalars
from camshaft.recipe.nodes import show
from camshaft.recipe.suggest import nearest

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "none_required": "null",
}
WRONG_KIND = frozenset(_EXPECTED) | {"literal_error", "enum"}
"""Errors which say that the value is of another kind, so that a union's other branches count."""
_BOUNDS = {
    "greater_than": ("greater than", "gt", "write a number above {}"),
    "greater_than_equal": ("at least", "ge", "write {} or more"),
    "less_than": ("less than", "lt", "write a number below {}"),
    "less_than_equal": ("at most", "le", "write {} or less"),
    "multiple_of": ("a multiple of", "multiple_of", "write a multiple of {}"),
}
_LENGTHS = {
    "too_short": ("at least", "min_length", "item(s)"),
    "too_long": ("at most", "max_length", "item(s)"),
    "string_too_short": ("at least", "min_length", "character(s)"),
    "string_too_long": ("at most", "max_length", "character(s)"),
}
_NUMBERS = frozenset({"a whole number", "a number"})
_OTHER_NAMES = {
    "gpu": "cuda",
    "half": "bf16",
    "fp16": "bf16",
    "float16": "bf16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
}
"""What other programs call a value, and what is meant; spelling alone would find ``cpu`` for ``gpu``."""
_SWITCHES = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def of(kind: str, value: Any, context: Mapping[str, Any], message: str) -> tuple[str, str]:
    """(message, fix) for one error of pydantic that is neither a missing nor an unknown key."""
    if kind in WRONG_KIND:
        return of_union([(kind, context)], value)
    if kind in _BOUNDS:
        word, name, fix = _BOUNDS[kind]
        bound = _number(context[name])
        return f"must be {word} {bound}, got {show(value)}", fix.format(bound)
    if kind in _LENGTHS:
        word, name, of = _LENGTHS[kind]
        count, bound = context.get("actual_length", len(value)), context[name]
        return f"must have {word} {bound} {of}, got {count}", f"give {word} {bound}, or remove the key"
    if kind in ("value_error", "assertion_error"):
        head, _, fix = str(context.get("error", message)).partition(" Fix: ")
        return head.rstrip("."), fix
    return f"{message[:1].lower()}{message[1:]}, got {show(value)}", ""


def of_union(branches: Sequence[tuple[str, Mapping[str, Any]]], value: Any) -> tuple[str, str]:
    """(message, fix) for a value that is of no kind that its key may have. Branches: (kind of error, context)."""
    expected: list[str] = []
    choices: list[str] = []
    for kind, context in branches:
        text = context["expected"] if kind in ("literal_error", "enum") else _EXPECTED.get(kind, "")
        if kind in ("literal_error", "enum"):
            choices += re.findall(r"'([^']*)'", text)
        if text and text not in expected:
            expected.append(text)
    return f"must be {' or '.join(expected)}, got {show(value)}", _fix(expected, choices, value)


def _fix(expected: Sequence[str], choices: Sequence[str], value: Any) -> str:
    if value is None:
        return "give a value, or remove the key"
    if isinstance(value, str) and (found := _from_text(expected, choices, value)):
        return found
    if isinstance(value, float) and value.is_integer() and "a whole number" in expected:
        return f"write {int(value)}"
    if "a text" in expected and isinstance(value, int | float):
        return "put it in quotes"
    if "a mapping" in expected and not isinstance(value, str):
        return "write {} for the defaults, or the keys below it"
    if expected == ["a mapping"]:
        return "write a mapping (its keys are in docs/recipe.md)"
    if expected == ["a list"]:
        return "give it as a whole, in brackets: [...]"
    if not choices:
        return f"write {' or '.join(expected)}"
    write = f"write {' or '.join(repr(choice) for choice in choices)}"
    return f"{write}, or a mapping (its keys are in docs/recipe.md)" if "a mapping" in expected else write


def _from_text(expected: Sequence[str], choices: Sequence[str], text: str) -> str:
    """What to write instead of a text."""
    near = _OTHER_NAMES.get(text.lower())
    if near not in choices:
        near = nearest(text, choices)
    if near:
        return f"did you mean '{near}'?"
    if "true or false" in expected:
        meant = _SWITCHES.get(text.lower(), text.lower() if text.lower() in ("true", "false") else "")
        return f"write {meant} without quotes: YAML 1.2 reads {text} as a text" if meant else "write true or false"
    if "a list" in expected and text:
        return f"write a list: [{text}]"
    if not _NUMBERS.intersection(expected):
        return ""
    if scalars.is_number(text):
        return _unquoted(expected, text)
    bare = text.replace("_", "").replace(",", "").replace(" ", "")
    return f"write {bare}: YAML 1.2 has no separators in numbers" if scalars.is_number(bare) else ""


def _unquoted(expected: Sequence[str], text: str) -> str:
    value = scalars.resolve(text)
    if isinstance(value, float) and "a number" not in expected:
        return f"write {int(value)}" if value.is_integer() else "write a whole number, without quotes"
    return f"remove the quotes: write {text}"


def _number(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
