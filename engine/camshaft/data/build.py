"""Text to an indexed dataset: encode in batches, end every document with eod, report as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from camshaft.data.indexed import dtype_for
from camshaft.data.tokenizer import Tokenizer
from camshaft.data.writer import IndexedWriter
from camshaft.errors import Problem, RecipeError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all or 0 where unknown)."""

_BATCH_BYTES = 1 << 21


@dataclass(frozen=True, slots=True)
class Built:
    """What was written: documents, tokens with eod, and bytes of text."""

    documents: int
    tokens: int
    text_bytes: int


def write_tokens(
    texts: Iterable[str], tokenizer: Tokenizer, prefix: Path, *, total_bytes: int = 0, progress: Progress | None = None
) -> Built:
    """Encode ``texts`` and write them under ``prefix``. Memory is bounded by 2 MiB of text plus one document.

    Nothing appears under the prefix if ``texts`` raises.

    Raises:
        RecipeError: there is no text at all.
    """
    done, eod = 0, np.array([tokenizer.eod_id], np.int64)
    with IndexedWriter(prefix, dtype_for(tokenizer.vocab_size)) as writer:
        for batch, size in batches(texts):
            for ids in tokenizer.encode_batch(batch):
                writer.add(np.concatenate([ids, eod]))
            done += size
            if progress is not None:
                progress("tokenising", done, total_bytes)
        if writer.documents == 0:
            raise RecipeError(Problem("the corpus is empty: no file holds any text", fix="name files with text"))
    return Built(writer.documents, writer.tokens, done)


def batches(texts: Iterable[str]) -> Iterable[tuple[list[str], int]]:
    """Lists of texts with their bytes of UTF-8, each of 2 MiB or a little more."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if size >= _BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size
