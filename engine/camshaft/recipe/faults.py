"""Pydantic's errors as problems of a recipe: the key, what was got, and what to write instead."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from camshaft.errors import Problem
from camshaft.recipe import wording
from camshaft.recipe.nodes import join, show_key
from camshaft.recipe.suggest import nearest

MOST = 200
"""Errors of one section that are told; nobody reads more, and each costs a search for the right name."""

Elsewhere = Callable[[str, str, Any], str | None]
"""(unknown key, its section, its value) to where it could belong, or None."""


@dataclass(frozen=True, slots=True)
class _Error:
    """One error of pydantic: its keys in the input, the branches of unions that it was found in, and the rest."""

    keys: tuple[str, ...]
    branches: tuple[tuple[int, str], ...]
    """(number of keys before the union, label of the branch)."""
    kind: str
    value: Any
    context: Mapping[str, Any]
    message: str


@dataclass(frozen=True, slots=True)
class _Fault:
    problem: Problem
    kind: str
    meant: str | None = None


def problems(
    error: ValidationError, tree: Any, model: type[BaseModel], prefix: str, elsewhere: Elsewhere
) -> list[Problem]:
    """Every fault of ``tree``, which ``model`` refused. ``prefix`` is the recipe key of ``tree``."""
    translator = _Translator(tree, model, prefix, elsewhere)
    items = error.errors(include_url=False)
    found = [_placed(item, tree) for item in items[:MOST]]
    told = [fault.problem for fault in translator.translate(found, depth=0)]
    if len(items) > MOST:
        told.append(Problem(f"{len(items) - MOST} more faults are not shown", key=prefix))
    return told


def _placed(item: Mapping[str, Any], tree: Any) -> _Error:
    """Tell keys of the input from the labels that pydantic adds for branches of a union."""
    keys: list[str] = []
    branches: list[tuple[int, str]] = []
    location, value = item["loc"], tree
    for index, part in enumerate(location):
        last_and_missing = index == len(location) - 1 and item["type"] == "missing"
        if isinstance(value, dict) and (part in value or last_and_missing):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        else:
            branches.append((len(keys), str(part)))
            continue
        keys.append(str(part))
    return _Error(tuple(keys), tuple(branches), item["type"], item["input"], item.get("ctx", {}), item["msg"])


@dataclass(frozen=True, slots=True)
class _Translator:
    tree: Any
    model: type[BaseModel]
    prefix: str
    elsewhere: Elsewhere

    def translate(self, errors: Sequence[_Error], depth: int, branch: str | None = None) -> list[_Fault]:
        """Faults of one level of unions; errors inside a union are condensed first."""
        plain = [error for error in errors if len(error.branches) <= depth]
        unions: dict[tuple[str, ...], list[_Error]] = {}
        for error in errors:
            if len(error.branches) > depth:
                unions.setdefault(error.keys[: error.branches[depth][0]], []).append(error)
        faults = [self._single(error, branch) for error in plain]
        for keys, inside in unions.items():
            faults += self._union(keys, inside, depth)
        return _fold(faults)

    def _union(self, keys: tuple[str, ...], errors: Sequence[_Error], depth: int) -> list[_Fault]:
        """The branch that the user most likely meant, or all branches in one sentence."""
        entered: dict[str, list[_Error]] = {}
        for error in errors:
            entered.setdefault(error.branches[depth][1], []).append(error)
        inner = {
            label: self.translate(found, depth + 1, label)
            for label, found in entered.items()
            if any(len(error.keys) > len(keys) or error.kind not in wording.WRONG_KIND for error in found)
        }
        if inner:
            level = self._key(keys).count(".") + 1
            return min(inner.values(), key=lambda faults: _distance(faults, level))
        value = errors[0].value
        message, fix = wording.of_union([(error.kind, error.context) for error in errors], value)
        return [_Fault(Problem(message, key=self._key(keys), fix=fix), "value")]

    def _single(self, error: _Error, branch: str | None) -> _Fault:
        key = self._key(error.keys)
        if error.kind == "missing" and isinstance(error.value, list):
            message = f"too few items: {len(error.value)}"
            return _Fault(Problem(message, key=self._key(error.keys[:-1])), "value")
        if error.kind == "missing":
            name = error.keys[-1]
            where = self._key(error.keys[:-1])
            fix = f"add '{name}: ...'" + (f" under '{where}'" if where else "")
            return _Fault(Problem("a required key is missing", key=key, fix=fix), "missing")
        if error.kind == "extra_forbidden":
            return self._unknown(error, key, branch)
        message, fix = wording.of(error.kind, error.value, error.context, error.message)
        return _Fault(Problem(message, key=key, fix=fix), "value")

    def _unknown(self, error: _Error, key: str, branch: str | None) -> _Fault:
        name = error.keys[-1]
        section = self._key(error.keys[:-1])
        models = list(models_at(self.model, error.keys[:-1]))
        models = [model for model in models if model.__name__ == branch] or models
        names = [key for model in models for key in keys_of(model)]
        meant = nearest(name, names)
        home = self.elsewhere(name, section, error.value)
        message = f"unknown key '{show_key(name)}'"
        if home and home.rsplit(".", 1)[-1] == name:
            told = f"{message}: it belongs to '{_parent(home)}'", f"set {home} instead"
            meant = None
        elif meant:
            told = f"{message}. Did you mean '{meant}'?", f"write '{meant}'"
        elif home:
            told = f"{message}. Did you mean '{home}'?", f"set {home} instead"
        else:
            told = message, f"remove it; keys of {section or 'a recipe'}: {', '.join(names) or 'none'}"
        return _Fault(Problem(told[0], key=key, fix=told[1]), "unknown", meant)

    def _key(self, keys: Sequence[str]) -> str:
        key = self.prefix
        for part in keys:
            key = join(key, part)
        return key


def _parent(key: str) -> str:
    return key.rpartition(".")[0] or "the root of the recipe"


def _distance(faults: list[_Fault], level: int) -> tuple[int, int]:
    """How far a branch of a union is from what was written: first by its own keys, then by all that is below."""
    own = [fault for fault in faults if fault.kind != "value" and fault.problem.key.count(".") == level]
    return len(own), len(faults)


def _fold(faults: list[_Fault]) -> list[_Fault]:
    """A misspelt required key is one fault, not an unknown key and a missing one."""
    meant = {join(fault.problem.key.rpartition(".")[0], fault.meant) for fault in faults if fault.meant}
    return [fault for fault in faults if not (fault.kind == "missing" and fault.problem.key in meant)]


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields of a model under the keys that a recipe uses: an alias (``async``, no Python name) goes first."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def models_at(model: type[BaseModel], keys: Iterable[str]) -> list[type[BaseModel]]:
    """Every model that can stand at ``keys`` below ``model``, through unions, lists and mappings."""
    types: list[Any] = [model]
    for key in keys:
        types = [below for kind in types for below in _below(kind, key)]
    return [kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _below(kind: Any, key: str) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = keys_of(kind).get(key)
        return [] if field is None else _branches(field.annotation)
    arguments = typing.get_args(kind)
    return _branches(arguments[-1]) if arguments else []


def _branches(kind: Any) -> list[Any]:
    """The members of a union, without annotations; containers stay as they are."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _branches(typing.get_args(kind)[0])
    if origin in (Union, UnionType):
        return [inner for member in typing.get_args(kind) for inner in _branches(member)]
    return [kind]
