"""Overrides from the command line: ``a.b.c=value``, with the scalars, lists and mappings of the recipe's YAML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from camshaft.errors import Problem, RecipeError
from camshaft.recipe import scalars, secrets
from camshaft.recipe.merge import KEY as EXTENDS
from camshaft.recipe.nodes import Document, Node, Origin, join, show
from camshaft.recipe.reader import MAX_DEPTH, parse

_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_RESERVED = "&*!|>%@`,]}"
_HOW = "write it as section.key=value, for example training.max_steps=100"


def apply(document: Document, overrides: Sequence[str]) -> None:
    """Set each override in ``document``'s tree, in order; faults are added to its problems."""
    for number, text in enumerate(overrides, 1):
        key, sign, value = text.partition("=")
        key = key.strip()
        origin = Origin("override", f"override {number}")
        if not sign or not _KEY.fullmatch(key) or key.count(".") >= MAX_DEPTH:
            message = f"'{_safe(key)}' is not a usable override"
            document.problems.append(origin.place(Problem(message, fix=_HOW)))
            continue
        origin = Origin("override", f"override {number} ({key})")
        if key.split(".")[0] == EXTENDS:
            message = "bases are chosen in the file, not by an override"
            document.problems.append(origin.place(Problem(message, key=key, fix="write a recipe that extends them")))
            continue
        node = _value(document, key, value, origin)
        if node is not None:
            _set(document, key, node)


def _safe(text: str) -> str:
    """A malformed override without what could be a secret's value."""
    head = re.split(r"[^A-Za-z0-9_.-]", text, maxsplit=1)[0]
    if secrets.is_secret_name(head) or secrets.has_secret_shape(text):
        return "..."
    return show(head)[1:-1] + ("..." if len(head) < len(text) else "")


def _value(document: Document, key: str, text: str, origin: Origin) -> Node | None:
    """The node of one override's value, or None with the fault reported."""
    scratch = Document(Node({}, origin))
    try:
        scratch = _parse(text, origin)
    except RecipeError as error:
        document.problems += [replace(problem, key=key) for problem in error.problems]
        return None
    except ValueError as error:
        document.problems.append(origin.place(Problem(str(error), key=key, fix=_HOW)))
        return None
    document.problems += [replace(problem, key=join(key, problem.key).strip(".")) for problem in scratch.problems]
    holder = Document(Node({}, origin))
    _set(holder, key, scratch.root)
    secrets.check(holder)
    document.problems += holder.problems
    return scratch.root


def _parse(text: str, origin: Origin) -> Document:
    """Only what starts with a bracket or a quote is parsed; the rest is one plain scalar, ``#`` and ``:`` included."""
    text = text.strip()
    if not text:
        raise ValueError("the value is missing; null is written out")
    if scalars.unprintable(text):
        raise ValueError("the value holds control characters or bytes that are not UTF-8")
    if text[0] in "[{\"'":
        return parse(text, origin)
    if text[0] in _RESERVED:
        raise ValueError(f"a value cannot start with '{text[0]}': put it in quotes")
    try:
        return Document(Node(scalars.resolve(text), origin, plain=True))
    except ValueError as error:
        raise RecipeError(origin.place(Problem(str(error), fix="give a finite number of usual length"))) from None


def _set(document: Document, key: str, node: Node) -> None:
    """Put ``node`` at ``key``, making mappings on the way where nothing is set."""
    parts = key.split(".")
    parent = document.root
    for index, part in enumerate(parts[:-1]):
        if parent.value is None:
            parent.value, parent.origin = {}, node.origin
        child = parent.get(part)
        if child is None and isinstance(parent.value, dict):
            child = parent.value[part] = Node({}, node.origin)
        if child is None:
            document.problems.append(_no_place(parent, parts[: index + 1], key, node))
            return
        parent = child
    if parent.value is None:
        parent.value, parent.origin = {}, node.origin
    if isinstance(parent.value, dict):
        parent.value[parts[-1]] = node
    elif isinstance(parent.value, list) and parts[-1].isdecimal() and int(parts[-1]) < len(parent.value):
        parent.value[int(parts[-1])] = node
    else:
        document.problems.append(_no_place(parent, parts, key, node))


def _no_place(parent: Node, parts: list[str], key: str, node: Node) -> Problem:
    """Why the last of ``parts`` does not exist below ``parent``, a scalar or a list."""
    where, last = ".".join(parts[:-1]), parts[-1]
    if isinstance(parent.value, list):
        message = f"'{where}' is a list of {len(parent.value)}: it has no item '{last}'"
        fix = f"count from 0 to {len(parent.value) - 1}, or give the whole list: {where}=[...]"
    else:
        value = "a value that is refused" if parent.bad else show(parent.value)
        message = f"'{where}' is {value}, which has no keys"
        fix = f"give it as a whole: {where}={{...}}"
    return node.origin.place(Problem(message, key=key, fix=fix))
