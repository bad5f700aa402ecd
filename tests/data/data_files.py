"""Small texts and datasets that the tests of recipes' data share."""

from __future__ import annotations

import numpy as np

from camshaft.data.writer import IndexedWriter

WORDS = ("camshaft", "valve", "stroke", "moment", "opens", "each", "exact", "the", "of", "a", "engine", "token")


def sentence(seed, size=30):
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[index] for index in rng.integers(0, len(WORDS), size))


def indexed(folder, name, documents, dtype="<u2"):
    with IndexedWriter(folder / name, np.dtype(dtype)) as writer:
        for one in documents:
            writer.add(one)
    return {"prefix": name}


def keys(problems):
    return [problem.key for problem in problems]
