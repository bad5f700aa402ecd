"""Several datasets read in given shares: which part a sample comes from is a table lookup, so any place is
O(1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from camshaft.data.permutation import Permutation, shuffled
from camshaft.data.samples import Row, SampleDataset

PERIOD = 1 << 16


def shares(weights: Sequence[float], period: int = PERIOD) -> list[int]:
    """Samples of each part in one period: the largest-remainder (Hamilton) apportionment. Sums to ``period``.

    Raises:
        ValueError: a weight is so small that its part would never appear; the argument is the part's index.
    """
    total = sum(weights)
    exact = [weight / total * period for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda part: (counts[part] - exact[part], part))
    for part in by_remainder[: period - sum(counts)]:
        counts[part] += 1
    for part, count in enumerate(counts):
        if count == 0:
            raise ValueError(part)
    return counts


class BlendedDataset:
    """Parts in fixed shares. Every aligned run of ``PERIOD`` samples holds each part exactly ``shares``
    times.

    An epoch of a blend is as many samples as its parts have together. Epochs follow each other without a
    seam: each part is read through in an order of its own, chosen by (seed, part, the part's own epoch),
    and starts again when it ends, independent of the blend's epochs.
    """

    shuffled = True

    def __init__(self, parts: Sequence[SampleDataset], weights: Sequence[float], seed: int) -> None:
        self.parts, self.seed = tuple(parts), seed
        self._counts = shares(weights)
        table = np.repeat(np.arange(len(parts), dtype=np.int32), self._counts)
        self._table: NDArray[np.int32] = table[shuffled(PERIOD, seed, "blend")]
        self._rank = np.empty(PERIOD, np.int32)
        for part, count in enumerate(self._counts):
            self._rank[self._table == part] = np.arange(count)
        self._orders: dict[int, tuple[int, Permutation]] = {}

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def locate(self, index: int, epoch: int) -> tuple[int, int, int]:
        """(part, index in the part, epoch of the part) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        turn, slot = divmod(epoch * len(self) + index, PERIOD)
        part = self._table.item(slot)
        own_epoch, place = divmod(turn * self._counts[part] + self._rank.item(slot), len(self.parts[part]))
        return part, self._order(part, own_epoch)(place), own_epoch

    def sample(self, index: int, epoch: int) -> Row:
        """See ``SampleDataset.sample``."""
        part, own_index, own_epoch = self.locate(index, epoch)
        return self.parts[part].sample(own_index, own_epoch)

    def _order(self, part: int, epoch: int) -> Permutation:
        held = self._orders.get(part)
        if held is None or held[0] != epoch:
            held = (epoch, Permutation(len(self.parts[part]), self.seed, "part", part, epoch))
            self._orders[part] = held
        return held[1]
