"""What the data section of a recipe names: paths, corpora and tokenizers, with errors that point at the
recipe.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from camshaft.data import cache
from camshaft.data.build import Progress, write_tokens
from camshaft.data.corpus import Corpus, TextFiles
from camshaft.data.stdlib import Kind, StandardLibrary
from camshaft.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, train_bpe
from camshaft.errors import Problem, RecipeError
from camshaft.recipe.schema import IndexedData, TextData

if TYPE_CHECKING:
    from camshaft.recipe import Resolved

DEFAULT_VOCABULARY = 4096
_FORMAT = 1
"""Number of the layout and content of cache entries; a change makes old entries unreachable."""
_TRAINING_BYTES = 256 << 20
"""Text that a BPE is trained on at most."""


def has_tokenizer(resolved: Resolved) -> bool:
    """Whether there is a tokenizer: always for text, for tokenised data only if the recipe has the section."""
    return not isinstance(resolved.recipe.data.train, IndexedData) or "tokenizer" in resolved.tree


def given_tokenizer(resolved: Resolved) -> Tokenizer | None:
    """The tokenizer that exists before any data is read; None for a BPE, which is trained, and without one.

    Raises:
        RecipeError: ``tokenizer.path`` is missing or is no tokenizer.
    """
    section = resolved.recipe.tokenizer
    if not has_tokenizer(resolved) or section.type == "bpe":
        return None
    if section.type == "byte":
        return ByteTokenizer()
    if section.path is None:
        raise RecipeError(
            resolved.problem("tokenizer", "type 'file' needs the path of a tokenizer.json", "set tokenizer.path")
        )
    with blame(resolved, "tokenizer.path"):
        return _load(locate(resolved, section.path))


def vocab_size(resolved: Resolved) -> int | None:
    """Ids of the tokenizer; None where there is none. A BPE to be trained counts with the size it is asked
    for.

    Raises:
        RecipeError: ``tokenizer.path`` is missing or is no tokenizer.
    """
    tokenizer = given_tokenizer(resolved)
    if tokenizer is not None:
        return tokenizer.vocab_size
    return (resolved.recipe.tokenizer.vocab_size or DEFAULT_VOCABULARY) if has_tokenizer(resolved) else None


def corpus_of(resolved: Resolved, source: Kind | TextData, root: Path) -> Corpus:
    """The corpus that ``data.train`` or ``data.validation`` names; ``root`` is the cache folder."""
    if isinstance(source, TextData):
        files = [locate(resolved, file) for file in source.files]
        return TextFiles(files, source.json_key, cache.Digests(root))
    return StandardLibrary(source)


def locate(resolved: Resolved, path: str) -> Path:
    """A path of the recipe; relative ones start at the recipe's folder, ``~`` at the user's."""
    try:
        return resolved.base_dir / Path(path).expanduser()
    except RuntimeError:  # no such user, or one without a home
        return resolved.base_dir / path


def cache_folder(resolved: Resolved) -> Path:
    """Where built data is kept."""
    setting = resolved.recipe.data.cache_dir
    return cache.folder(None if setting is None else str(locate(resolved, setting)), os.environ)


def tokenised(
    corpus: Corpus, tokenizer: Tokenizer | None, bpe_size: int, root: Path, progress: Progress | None
) -> tuple[Path, Tokenizer]:
    """The cache entry that holds ``corpus`` as ``tokens.bin/.idx``, and its tokenizer.

    Without a ``tokenizer`` a BPE of ``bpe_size`` ids is trained and kept as ``tokenizer.json`` in the entry.
    """
    from tokenizers import __version__ as library

    made_by = tokenizer.fingerprint if tokenizer is not None else f"bpe {bpe_size} tokenizers {library}"
    key = hashlib.sha256(f"{_FORMAT}\0{corpus.key()}\0{made_by}".encode()).hexdigest()

    def build(folder: Path) -> None:
        used = tokenizer
        if used is None:
            path = folder / "tokenizer.json"
            path.write_text(train_bpe(training_sample(corpus, progress), bpe_size))
            used = FileTokenizer(path, bpe_size)
        write_tokens(corpus.documents(), used, folder / "tokens", total_bytes=corpus.size(), progress=progress)

    entry = cache.fetch(root, key, build)
    return entry, tokenizer or FileTokenizer(entry / "tokenizer.json", bpe_size)


def training_sample(corpus: Corpus, progress: Progress | None) -> Iterator[str]:
    """The first 256 MiB of a corpus's documents: they are shuffled, so these are a fair sample."""
    done, total = 0, min(corpus.size(), _TRAINING_BYTES)
    for number, text in enumerate(corpus.documents()):
        yield text
        done += len(text.encode())
        if progress is not None and number % 256 == 0:
            progress("training the tokenizer", done, total)
        if done >= _TRAINING_BYTES:
            return


@lru_cache(maxsize=4)
def _load_version(path: Path, version: tuple[int, int]) -> FileTokenizer:
    return FileTokenizer(path)


def _load(path: Path) -> FileTokenizer:
    """The file's tokenizer, parsed once for each version of the file."""
    if not path.is_file():
        return FileTokenizer(path)  # raises
    state = path.stat()
    return _load_version(path, (state.st_mtime_ns, state.st_size))


@contextmanager
def blame(resolved: Resolved, key: str) -> Iterator[None]:
    """Errors about files that are raised inside get the recipe's key and line; the file goes into the
    message.
    """
    try:
        yield
    except RecipeError as error:
        raise RecipeError([at(resolved, key, problem) for problem in error.problems]) from error


def at(resolved: Resolved, key: str, problem: Problem) -> Problem:
    """The same problem, put at a key of the recipe."""
    if problem.key:
        return problem
    place = f"{problem.file}:{problem.line}" if problem.line else problem.file
    return resolved.problem(key, f"{place}: {problem.message}" if place else problem.message, problem.fix)
