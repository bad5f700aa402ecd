"""What the loader reads: numbered samples of a fixed length. Numpy only."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""Label of a position that is not counted, the default ``ignore_index`` of torch's cross entropy."""

Ids: TypeAlias = NDArray[np.int64]
Row: TypeAlias = tuple[Ids, Ids, Ids, NDArray[np.int32] | None]
"""(tokens, labels, positions, document), each [sequence_length]; document is None for plain causal
attention.
"""


class SampleDataset(Protocol):
    """Samples 0 to ``len`` - 1 of every epoch. Pure: the same (index, epoch) gives the same row on every
    rank.

    A dataset whose samples already come in a shuffled order has an attribute ``shuffled`` that is True; the
    loader then takes them as they come.
    """

    def __len__(self) -> int:
        """Samples of one epoch, at least 1."""
        ...

    def sample(self, index: int, epoch: int) -> Row:
        """One sample. ``labels[i]`` is the token after ``tokens[i]``, or ``IGNORE``.

        Raises:
            RecipeError: the file holds data that cannot be trained on; names file and position.
        """
        ...
