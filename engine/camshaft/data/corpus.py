"""Where text comes from: files of a user's own. A corpus gives its documents in one fixed, shuffled order.

The order depends on the number of documents only, so that the tail of the written data is a fair validation
set.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from camshaft.data.permutation import shuffled
from camshaft.errors import Problem, RecipeError

JSON_LINES = (".jsonl", ".ndjson")


class Corpus(Protocol):
    """Text in documents."""

    def key(self) -> str:
        """sha256 of everything that decides the documents; must not need to take them apart."""
        ...

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in the shuffled order.

        Raises:
            RecipeError: text that cannot be read; names file and line.
        """
        ...

    def size(self) -> int:
        """About how many bytes ``documents`` gives, for a progress bar."""
        ...


class TextFiles:
    """Text files (one document each) and JSON lines files (one document a line, under ``json_key``).

    ``digest`` gives the sha256 of a file. Documents are found by a first pass that keeps three numbers for
    each, and read again in shuffled order, so that memory does not depend on the amount of text.
    """

    def __init__(
        self, files: Sequence[Path], json_key: str = "text", digest: Callable[[Path], bytes] | None = None
    ) -> None:
        self.files, self.json_key, self._digest = tuple(files), json_key, digest or file_digest

    def key(self) -> str:
        """See ``Corpus``. Reads every file once."""
        digest = hashlib.sha256(f"text files 1\0{self.json_key}\0".encode())
        for file in self.files:
            digest.update(f"{file.suffix in JSON_LINES}\0".encode() + self._digest(file))
        return digest.hexdigest()

    def size(self) -> int:
        """See ``Corpus``."""
        return sum(file.stat().st_size for file in self.files)

    def documents(self) -> Iterator[str]:
        """See ``Corpus``."""
        places = [array("q"), array("q"), array("q")]
        for place in self._places():
            for column, value in zip(places, place, strict=True):
                column.append(value)
        for number in shuffled(len(places[0]), "documents").tolist():
            file, offset, length = (column[number] for column in places)
            yield self._text(self.files[file], _read(self.files[file], offset, length), 0)

    def in_order(self) -> Iterator[str]:
        """Documents as they stand in the files."""
        for file in self.files:
            for _, raw, line in _pieces(file):
                if text := self._text(file, raw, line):
                    yield text

    def _places(self) -> Iterator[tuple[int, int, int]]:
        for number, file in enumerate(self.files):
            for offset, raw, line in _pieces(file):
                if self._text(file, raw, line):
                    yield number, offset, len(raw)

    def _text(self, file: Path, raw: bytes, line: int) -> str:
        """The document in ``raw``; empty for a blank one. ``line`` is 0 for a file that is one document."""
        try:
            content = raw.decode().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            _refuse(file, line, f"is not UTF-8: {error.reason} at byte {error.start}", "convert it to UTF-8")
        if file.suffix not in JSON_LINES:
            return content if content.strip() else ""
        return self._member(file, content, line) if content.strip() else ""

    def _member(self, file: Path, content: str, line: int) -> str:
        try:
            record: Any = json.loads(content)
        except (ValueError, RecursionError) as error:
            _refuse(file, line, f"is not JSON: {error}", "one JSON object a line")
        if not isinstance(record, dict):
            _refuse(file, line, f"is a JSON {type(record).__name__}, not an object", "one JSON object a line")
        if self.json_key not in record:
            has = ", ".join(map(repr, record)) or "nothing"
            _refuse(file, line, f"has no key '{self.json_key}' (it has {has})", "set json_key to the text's key")
        text = record[self.json_key]
        if not isinstance(text, str):
            _refuse(file, line, f"'{self.json_key}' is a {type(text).__name__}, not text", "give the text's key")
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            _refuse(file, line, f"'{self.json_key}' holds half of a surrogate pair", "write it as valid Unicode")
        return text if text.strip() else ""


def _pieces(file: Path) -> Iterator[tuple[int, bytes, int]]:
    """(offset, bytes, line) of each raw document of a file."""
    try:
        with file.open("rb") as handle:
            if file.suffix not in JSON_LINES:
                yield 0, handle.read(), 0
                return
            offset = 0
            for line, raw in enumerate(handle, 1):
                yield offset, raw, line
                offset += len(raw)
    except OSError as error:
        raise RecipeError(Problem(f"cannot be read: {error.strerror}", file=str(file))) from error


def _read(file: Path, offset: int, length: int) -> bytes:
    try:
        with file.open("rb") as handle:
            handle.seek(offset)
            return handle.read(length)
    except OSError as error:
        raise RecipeError(Problem(f"cannot be read: {error.strerror}", file=str(file))) from error


def _refuse(file: Path, line: int, message: str, fix: str) -> NoReturn:
    raise RecipeError(Problem(message, file=str(file), line=line or None, fix=fix))


def file_digest(path: Path) -> bytes:
    """sha256 of a file's content.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").digest()
    except OSError as error:
        raise RecipeError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from error
