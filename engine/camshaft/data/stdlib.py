"""Text that every CPython carries: its documentation topics, the docstrings of its library, and the
library's source.

Read in place and never imported: ``ast`` takes the files apart. The text differs between Python versions.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

from camshaft.data.permutation import shuffled
from camshaft.errors import MachineError

Kind = Literal["python-docs", "python-source"]
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"})
_TOPICS = "pydoc_data/topics.py"
_SHORTEST = 80
"""Characters of the shortest docstring that counts as a document."""


class StandardLibrary:
    """``python-docs``: a document a topic and a docstring; ``python-source``: a document a file.

    Raises:
        MachineError: this Python carries no source of its library.
    """

    def __init__(self, kind: Kind, root: Path | None = None) -> None:
        self.kind: Kind = kind
        self.root = root or Path(sysconfig.get_path("stdlib"))

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Relative paths of the files that are read, sorted."""
        found = sorted(_walk(self.root, Path()))
        if not found or (self.kind == "python-docs" and Path(_TOPICS) not in found):
            raise MachineError(
                f"{self.root} holds no source of Python's library, which data.train={self.kind} reads. "
                "Use a Python with its library, or name text of your own in data.train.files."
            )
        return tuple(found)

    def key(self) -> str:
        """sha256 of the Python version and of the files' names and contents."""
        digest = hashlib.sha256(f"{self.kind} 1\0{sys.version}\0{_SHORTEST}\0".encode())
        for file in self.files:
            content = (self.root / file).read_bytes()
            digest.update(f"{file.as_posix()}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def size(self) -> int:
        """About how many bytes of text there are (docstrings and topics are near a sixth of the source)."""
        total = sum((self.root / file).stat().st_size for file in self.files)
        return total if self.kind == "python-source" else total // 6

    def documents(self) -> Iterator[str]:
        """Every document once, in an order that depends on their number only."""
        found = list(dict.fromkeys(self._sources() if self.kind == "python-source" else self._prose()))
        for number in shuffled(len(found), "documents").tolist():
            yield found[number]

    def _sources(self) -> Iterator[str]:
        for file in self.files:
            text = (self.root / file).read_bytes().decode(errors="replace")
            if text.strip():
                yield text

    def _prose(self) -> Iterator[str]:
        for file in self.files:
            tree = _parse(self.root / file)
            if file.as_posix() == _TOPICS:
                yield from _topics(tree)
            else:
                yield from _docstrings(tree)


def _walk(root: Path, below: Path) -> Iterator[Path]:
    """Python files under ``root``/``below`` that belong to the library itself."""
    for entry in (root / below).iterdir():
        place = below / entry.name
        if entry.is_dir():
            if entry.name not in _SKIPPED and not entry.name.startswith("config-"):
                yield from _walk(root, place)
        elif entry.suffix == ".py" and not entry.name.startswith(("test_", "_sysconfigdata")):
            yield place


def _parse(path: Path) -> ast.Module:
    """The module's tree; empty for one that this Python cannot parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the library's own escapes are deprecated
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return ast.Module([], [])


def _topics(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == "topics" for one in targets):
            yield from ast.literal_eval(node.value).values()


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= _SHORTEST:
                yield text
