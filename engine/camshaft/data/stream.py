"""A range of documents of an indexed dataset, seen as one stream of tokens in which every document ends
with eod.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Self

import numpy as np

from camshaft.data.indexed import IndexedDataset
from camshaft.data.samples import Ids

_PROBES = 1024
_BLOCK = 32


class TokenStream:
    """Documents ``first`` to ``stop`` - 1, concatenated in file order.

    Place 0 is the first token of document ``first``. With ``append`` the stream holds ``eod`` after every
    document (none is in the file). Nothing is held per document.

    Args:
        data: the open dataset.
        vocab_size: ids are checked against it on every read; None where nothing is known.
        eod: the token that ends a document; None where nothing is known, then documents stay as they are.
    """

    def __init__(
        self, data: IndexedDataset, vocab_size: int | None, eod: int | None, first: int = 0, stop: int | None = None
    ) -> None:
        self.data, self.vocab_size, self.eod = data, vocab_size, eod
        self.first, self.stop = first, data.documents if stop is None else stop
        self.append = eod is not None and not _ends_with(data, eod)
        self._origin = data.start(self.first)
        self._end = data.start(self.stop)

    @property
    def documents(self) -> int:
        return self.stop - self.first

    def __len__(self) -> int:
        """Tokens of the stream."""
        return self._end - self._origin + self.documents * self.append

    def start(self, document: int) -> int:
        """Place of the first token of ``document``, counted from ``first``; ``documents`` gives the length."""
        return self.data.start(self.first + document) - self._origin + document * self.append

    def starts(self, low: int, high: int) -> Ids:
        """Places p with ``low`` <= p < ``high`` at which a document starts, ascending; empty ones repeat a
        place.
        """
        if high <= low:
            return np.empty(0, np.int64)
        begin = bisect_right(range(self.documents), low - 1, key=self.start)
        count = _BLOCK
        while True:  # one read of a block is cheaper than a second search, and mostly enough
            end = min(begin + count, self.documents)
            found = self.data.starts(self.first + begin, self.first + end) - self._origin
            if self.append:
                found += np.arange(begin, end)
            if end == self.documents or found[-1] >= high:
                return found[: int(np.searchsorted(found, high))]
            count *= 8

    def read(self, low: int, high: int) -> Ids:
        """Tokens at places ``low`` to ``high`` - 1.

        Raises:
            RecipeError: an id is outside the vocabulary, or the file has lost these tokens.
        """
        if not self.append:
            return self._read_file(self._origin + low, self._origin + high)
        cuts = self.starts(low + 1, high + 1)  # a document's eod is just before the start of the next one
        if high == len(self):
            cuts = np.append(cuts, high)
        before = bisect_right(range(self.documents), low, key=self.start) - 1
        begin = self._origin + low - before
        out = np.full(high - low, self.eod, np.int64)
        is_text = np.ones(high - low, bool)
        is_text[cuts - 1 - low] = False
        out[is_text] = self._read_file(begin, begin + int(np.count_nonzero(is_text)))
        return out

    def split(self, fraction: float) -> tuple[Self, Self]:
        """Two streams without a common document; the second is the tail with about ``fraction`` of the
        tokens.

        Both hold at least one document; there must be two.
        """
        if self.documents < 2:
            raise ValueError("one document cannot be split")
        wanted = round(len(self) * (1 - fraction))
        cut = bisect_right(range(self.documents), wanted, key=self.start)
        cut = min(max(cut, 1), self.documents - 1) + self.first
        make = type(self)
        return (
            make(self.data, self.vocab_size, self.eod, self.first, cut),
            make(self.data, self.vocab_size, self.eod, cut, self.stop),
        )

    def _read_file(self, start: int, stop: int) -> Ids:
        ids = self.data.read(start, stop)
        if self.vocab_size is not None:
            self.data.refuse_outside(ids, self.vocab_size, start)
        return ids


def _ends_with(data: IndexedDataset, eod: int) -> bool:
    """Whether documents carry their eod: looked up in up to 1024 documents spread over the file.

    One that does is enough: a tool writes the eod for all documents or for none.
    """
    for document in {data.documents * probe // _PROBES for probe in range(_PROBES)}:
        start, end = data.start(document), data.start(document + 1)
        if end > start and data.read(end - 1, end).item() == eod:
            return True
    return False
