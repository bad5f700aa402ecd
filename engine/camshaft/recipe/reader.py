"""A strict YAML reader: text to a tree with positions. PyYAML parses, the meaning of scalars is YAML 1.2's core schema.

Refused, each with its line: anchors, aliases, tags, merge keys, several documents, duplicate keys, keys that are no
text, numbers that are not finite, more than 32 levels, more than 1 MiB, anything but UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from camshaft.errors import Problem, RecipeError
from camshaft.recipe import scalars
from camshaft.recipe.nodes import Document, Node, Origin, Scalar, join, show_key

MAX_DEPTH = 32
MAX_BYTES = 1 << 20


def read_file(path: Path, shown: str) -> Document:
    """Read the recipe at ``path``; ``shown`` is how messages call it.

    Raises:
        RecipeError: it cannot be read, or is not one YAML document with a mapping at its root.
    """
    document = parse(_text(path, shown), Origin("file", shown))
    root = document.root
    if isinstance(root.value, dict):
        return document
    what = "is empty" if root.value is None else "is not a mapping of keys to values"
    raise RecipeError(
        Problem(f"the recipe {what}", file=shown, line=root.origin.line, fix="start it with 'schema_version: 1'")
    )


def _text(path: Path, shown: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        fix = "name a file in it" if isinstance(error, IsADirectoryError) else "check the path"
        raise RecipeError(Problem(f"cannot be read: {error.strerror}", file=shown[:200], fix=fix)) from None
    except ValueError:  # a NUL
        message = "cannot be read: a path with a control character"
        raise RecipeError(Problem(message, file=shown[:200], fix="check the path")) from None
    if len(content) > MAX_BYTES:
        raise RecipeError(
            Problem("larger than 1 MiB: this is no recipe", file=shown, line=1, fix="keep data in files of its own")
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(Problem("not UTF-8 text", file=shown, line=line, fix="save the file as UTF-8")) from None


def parse(text: str, origin: Origin) -> Document:
    """Parse one YAML document. With a line in ``origin``'s place each node gets its own.

    Raises:
        RecipeError: a syntax error, too many levels or more than one document.
    """
    try:
        return _Builder(text, origin).build()
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_syntax(error.problem or "not YAML", _line(error), origin)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise RecipeError(_syntax("a control character that YAML does not allow", line, origin)) from None


def _line(error: yaml.MarkedYAMLError) -> int:
    """Where to look: what is never closed is told at its start, all else where it was noticed."""
    unclosed = "end of stream" in (error.problem or "") or "<stream end>" in (error.problem or "")
    marks = (error.context_mark, error.problem_mark) if unclosed else (error.problem_mark, error.context_mark)
    return next((int(mark.line) for mark in marks if mark), 0)


def _syntax(problem: str, line: int, origin: Origin) -> Problem:
    fix = "check indentation, brackets and quotes near this line"
    if "'\\t'" in problem:
        problem, fix = "a tab where YAML allows only spaces", "indent with spaces"
    return _at(origin, line).place(Problem(f"not valid YAML: {problem}", fix=fix))


def _at(origin: Origin, line: int) -> Origin:
    """Overrides have no lines; files do."""
    return Origin("file", origin.source, line + 1) if origin.kind == "file" else origin


class _Builder:
    """Turns PyYAML's events into nodes; recoverable faults are collected, so that all come in one run."""

    def __init__(self, text: str, origin: Origin) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.origin = origin
        self.document = Document(Node(None, _at(origin, 0)))

    def build(self) -> Document:
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                break
        else:
            return self.document
        self.document.root = self._node(next(self.events), "", 0)
        next(self.events)
        rest = next(self.events)
        if isinstance(rest, yaml.DocumentStartEvent):
            raise self._fatal(rest, "more than one YAML document", "keep one document; remove '---' and what follows")
        return self.document

    def _node(self, event: Any, key: str, depth: int, origin: Origin | None = None) -> Node:
        node = Node(None, origin or _at(self.origin, event.start_mark.line))
        if isinstance(event, yaml.AliasEvent):
            self.document.refuse(node, key, "an alias (*name) is not allowed", "write the value out, or use extends:")
            return node
        if depth >= MAX_DEPTH and not isinstance(event, yaml.ScalarEvent):
            raise self._fatal(event, f"nested deeper than {MAX_DEPTH} levels", "flatten it", key)
        if isinstance(event, yaml.MappingStartEvent):
            node.value = self._mapping(key, depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            node.value = self._sequence(key, depth)
        else:
            self._scalar(node, event, key)
        self._decorations(node, event, key)
        return node

    def _decorations(self, node: Node, event: Any, key: str) -> None:
        if event.anchor is not None:
            self.document.refuse(node, key, "an anchor (&name) is not allowed", "write the value out, or use extends:")
        if event.tag is not None:
            self.document.refuse(node, key, f"a tag ({show_key(event.tag)}) is not allowed", "remove the tag")

    def _mapping(self, prefix: str, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            origin = _at(self.origin, event.start_mark.line)
            name = self._key(event, prefix, depth, origin)
            node = self._node(next(self.events), join(prefix, name or "?"), depth + 1, origin)
            if name is None:
                continue
            if name in found:
                self._twice(name, prefix, found[name].origin, origin)
                continue
            found[name] = node
        return found

    def _twice(self, name: str, prefix: str, first: Origin, second: Origin) -> None:
        message = f"'{show_key(name)}' is given twice" + (f", first in line {first.line}" if first.line else "")
        self.document.problems.append(
            second.place(Problem(message, key=join(prefix, name), fix="remove one of the two"))
        )

    def _key(self, event: Any, prefix: str, depth: int, origin: Origin) -> str | None:
        """The key's text, or None with the fault reported."""
        message, fix = "a key must be a text", "write a plain name before the ':'"
        if isinstance(event, yaml.ScalarEvent):
            plain_text = event.style is None and event.tag is None
            if scalars.unprintable(event.value) or "\n" in event.value:
                message, fix = "a key holds control characters or half a surrogate pair", "remove them"
            elif plain_text and event.value == "<<":
                message, fix = "the merge key '<<' is not allowed", "write the keys out, or use extends:"
            elif not plain_text or self._is_text(event.value):
                self._decorations(Node(None, origin), event, join(prefix, event.value))
                return str(event.value)
            else:
                message = f"the key '{show_key(event.value)}' is not a text"
                fix = "put it in quotes, if it is a name"
        else:
            self._node(event, prefix, depth + 1)
        self.document.refuse(Node(None, origin), prefix, message, fix)
        return None

    @staticmethod
    def _is_text(value: str) -> bool:
        try:
            return isinstance(scalars.resolve(value), str)
        except ValueError:
            return False

    def _sequence(self, prefix: str, depth: int) -> list[Node]:
        found: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            found.append(self._node(event, join(prefix, len(found)), depth + 1))
        return found

    def _scalar(self, node: Node, event: Any, key: str) -> None:
        node.plain = event.style is None
        node.value = event.value
        if scalars.unprintable(event.value):
            self.document.refuse(node, key, "the text holds control characters or half a surrogate pair", "remove them")
            node.value = ""
        elif node.plain and not event.value and _is_section_of_a_plugin(key):
            name = key.rpartition(".")[2]
            fix = f"write '{name}: {{}}' for the defaults, or '{name}: null' to switch it off"
            self.document.refuse(node, key, "the value is missing; null is written out", fix)
            node.value = None
        elif node.plain:
            self._resolve(node, event.value, key)

    def _resolve(self, node: Node, text: str, key: str) -> None:
        value: Scalar = None
        try:
            value = scalars.resolve(text)
        except ValueError as error:
            self.document.refuse(node, key, str(error), "give a finite number of usual length")
        node.value = value

    def _fatal(self, event: Any, message: str, fix: str, key: str = "") -> RecipeError:
        place = _at(self.origin, event.start_mark.line)
        return RecipeError([*self.document.problems, place.place(Problem(message, key=key[:60], fix=fix))])


def _is_section_of_a_plugin(key: str) -> bool:
    """Whether an empty value at ``key`` would switch a plugin off that its author meant to switch on."""
    return key.startswith("plugins.") and key.count(".") == 1
