"""Faults of the data that a recipe names, found without building or training anything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from camshaft.data import sources
from camshaft.data.blend import shares
from camshaft.data.corpus import TextFiles
from camshaft.data.indexed import IndexedDataset
from camshaft.data.prepare import model_vocabulary
from camshaft.errors import Problem, RecipeError
from camshaft.recipe.schema import BlendPart, IndexedData, TextData

if TYPE_CHECKING:
    from camshaft.recipe import Resolved

_SCAN_BYTES = 64 << 20
"""Tokens of one blend that are compared with the vocabulary; the loader compares all that it reads."""
_LOOK_BYTES = 16 << 20
"""Text that is read of each file to find faults early; the rest is checked when it is tokenised."""


def check(resolved: Resolved) -> list[Problem]:
    """Every fault of ``data`` and ``tokenizer``, with keys of the recipe. Empty when there is none.

    Looked at: files that are missing, damaged, empty, or shorter than one sample; text that is no UTF-8 or
    JSON; ids outside the model's vocabulary; a tokenizer that does not load or is larger than the model's
    vocabulary.
    """
    data, found = resolved.recipe.data, _tokenizer(resolved)
    for key, source in (("data.train", data.train), ("data.validation", data.validation)):
        if isinstance(source, IndexedData):
            found += _weights(resolved, key, source.blend)
            for number, part in enumerate(source.blend):
                found += _indexed(resolved, f"{key}.blend.{number}.prefix", part, _SCAN_BYTES // len(source.blend))
        elif isinstance(source, TextData):
            found += _text(resolved, key, source)
    if data.validation is not None and "validation_fraction" in (resolved.tree.get("data") or {}):
        found.append(
            resolved.problem(
                "data.validation_fraction",
                "has no effect, because data.validation names a validation set of its own",
                "remove one of the two",
            )
        )
    return found


def _tokenizer(resolved: Resolved) -> list[Problem]:
    section, found = resolved.recipe.tokenizer, []
    data = resolved.recipe.data
    if section.type == "bpe" and has_indexed_train(resolved) and sources.has_tokenizer(resolved):
        text = "a BPE is trained on text, and data.train is tokenised already"
        found.append(resolved.problem("tokenizer", text, "use type 'file' or 'byte', or remove the section"))
    if isinstance(data.validation, TextData) and has_indexed_train(resolved) and not sources.has_tokenizer(resolved):
        text = "is text, and no tokenizer is named to turn it into the ids of the training data"
        found.append(resolved.problem("data.validation", text, "name the tokenizer of the training data"))
    for option, kind in (("path", "file"), ("vocab_size", "bpe")):
        if getattr(section, option) is not None and section.type != kind:
            text = f"has no effect with type '{section.type}'"
            found.append(resolved.problem(f"tokenizer.{option}", text, f"set tokenizer.type={kind}, or remove it"))
    try:
        sources.given_tokenizer(resolved)
    except RecipeError as error:
        return [*found, *error.problems]
    return found


def has_indexed_train(resolved: Resolved) -> bool:
    """Whether the training data is tokenised already."""
    return isinstance(resolved.recipe.data.train, IndexedData)


def _weights(resolved: Resolved, key: str, blend: Sequence[BlendPart]) -> list[Problem]:
    try:
        shares([part.weight for part in blend])
    except ValueError as error:
        text = "is too small for the part to ever be read"
        return [resolved.problem(f"{key}.blend.{error.args[0]}.weight", text, "raise it, or remove the part")]
    return []


def _indexed(resolved: Resolved, key: str, part: BlendPart, scan_bytes: int) -> list[Problem]:
    try:
        data = IndexedDataset(sources.locate(resolved, part.prefix))
        rows = model_vocabulary(resolved)
        if rows is not None:
            data.check_ids(rows, scan_bytes)
    except RecipeError as error:
        return [sources.at(resolved, key, problem) for problem in error.problems]
    return _short(resolved, key, data.tokens + data.documents)


def _no_file(path: Path) -> tuple[str, str]:
    """(message, fix) for a path of a text file that holds none."""
    if os.path.isdir(path):  # noqa: PTH112  (any text)
        return f"{path}: is a folder", "name the files in it one by one"
    if "*" in path.name or "?" in path.name:
        return f"{path}: there is no such file", "name the files one by one: patterns are not expanded"
    return f"{path}: there is no such file", "correct the path"


def _text(resolved: Resolved, key: str, source: TextData) -> list[Problem]:
    found, empty = [], True
    for number, name in enumerate(source.files):
        file_key, path = f"{key}.files.{number}", sources.locate(resolved, name)
        if not os.path.isfile(path):  # noqa: PTH113  (any text)
            found.append(resolved.problem(file_key, *_no_file(path)))
            continue
        try:
            empty = not _some(TextFiles([path], source.json_key)) and empty
        except RecipeError as error:
            found += [sources.at(resolved, file_key, problem) for problem in error.problems]
    if found:
        return found
    if empty:
        text = "the corpus is empty: no file holds any text"
        return [resolved.problem(f"{key}.files", text, "name files that hold text")]
    # No tokenizer makes more tokens than bytes, and every document has at least one byte.
    size = sum(sources.locate(resolved, name).stat().st_size for name in source.files)
    return _short(resolved, f"{key}.files", 2 * size)


def _some(files: TextFiles) -> bool:
    """Whether there is text; reads the first 16 MiB."""
    seen = 0

    def within(texts: Iterator[str]) -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    for _ in takewhile(lambda _: seen < _LOOK_BYTES, within(files.in_order())):
        pass
    return seen > 0


def _short(resolved: Resolved, key: str, most_tokens: int) -> list[Problem]:
    """A problem if not even ``most_tokens`` fill one sample. Validation sets may be shorter: they are
    padded.
    """
    needed = resolved.recipe.data.sequence_length if resolved.recipe.data.pack else 2
    if most_tokens >= needed or not key.startswith("data.train"):
        return []
    text = f"holds at most {most_tokens} tokens, and one sample takes {needed}"
    return [resolved.problem(key, text, "name more text, or lower data.sequence_length")]
