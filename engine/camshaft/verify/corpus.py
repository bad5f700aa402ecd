"""Documents of uneven lengths, made of nothing but a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from camshaft.data.indexed import dtype_for
from camshaft.data.writer import IndexedWriter


def write(prefix: Path, *, vocabulary: int, length: int, tokens: int, seed: int) -> None:
    """Write an indexed dataset of at least ``tokens`` tokens: documents of 2 to 2 ``length`` tokens, rare ids rare.

    Lengths are uneven, so that ranks and microbatches count other numbers of labels, packed or not.
    """
    chooser = np.random.default_rng(seed)
    frequency = 1.0 / np.arange(1, vocabulary + 1)
    written = 0
    with IndexedWriter(prefix, dtype_for(vocabulary)) as writer:
        while written < tokens:
            size = int(chooser.integers(2, 2 * length + 1))
            writer.add(chooser.choice(vocabulary, size, p=frequency / frequency.sum()))
            written += size
