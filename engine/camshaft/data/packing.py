"""How documents become samples of a fixed length: packed into a stream that is cut, or one document a
sample.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from camshaft.data.permutation import number
from camshaft.data.samples import IGNORE, Row
from camshaft.data.stream import TokenStream


class PackedDataset:
    """The stream, closed to a ring, is cut every ``sequence_length`` tokens.

    Epoch 0 starts at the first token, every later epoch at a place that (seed, epoch) choose, so that the
    cuts differ. Every token is the input of exactly one sample of an epoch. The last sample takes what is
    left and is padded: with eod (0 where there is none) and labels that do not count. With
    ``document_mask`` the label of a document's last token does not count, positions restart with every
    document and ``document`` numbers the documents of a row, the padding being one of its own; so an epoch
    counts (tokens - documents that are not empty) labels. Without it, every token is the label of exactly
    one sample.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int, *, document_mask: bool = True) -> None:
        self.stream, self.sequence_length, self.seed = stream, sequence_length, seed
        self.document_mask = document_mask
        self._places = np.arange(sequence_length, dtype=np.int64)
        self._places.setflags(write=False)
        self._tokens = len(stream)
        self._pad = stream.eod or 0

    def __len__(self) -> int:
        return -(-self._tokens // self.sequence_length)

    def rotation(self, epoch: int) -> int:
        """Place of the stream at which ``epoch`` starts."""
        return 0 if epoch == 0 else number(self.seed, epoch, "rotation") % self._tokens

    def sample(self, index: int, epoch: int) -> Row:
        """See ``SampleDataset.sample``. Reads ``sequence_length`` + 1 tokens."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        length = self.sequence_length
        real = min(length, self._tokens - index * length)
        start = (self.rotation(epoch) + index * length) % self._tokens
        window = np.full(length + 1, self._pad, np.int64)
        self._fill(window[: real + 1], start)
        tokens, labels = window[:length], window[1:].copy()
        tokens[real:] = self._pad
        labels[real:] = IGNORE
        if not self.document_mask:
            return tokens, labels, self._places, None
        begins = self._begins(start, real)
        labels[begins[1:]] = IGNORE
        begins[real] = True
        begins[0] = False
        document = np.cumsum(begins[:length], dtype=np.int32)
        positions = self._places - np.maximum.accumulate(np.where(begins[:length], self._places, 0))
        return tokens, labels, positions, document

    def _fill(self, window: NDArray[np.int64], start: int) -> None:
        """Tokens of the ring from ``start`` on; a window is at most one longer than the ring."""
        first = min(len(window), self._tokens - start)
        window[:first] = self.stream.read(start, start + first)
        if first < len(window):
            window[first:] = self.stream.read(0, len(window) - first)

    def _begins(self, start: int, real: int) -> NDArray[np.bool_]:
        """[sequence_length + 1] Whether a document begins at each of the window's first ``real`` + 1
        places.
        """
        begins = np.zeros(self.sequence_length + 1, bool)
        end = start + real + 1
        begins[self.stream.starts(start, min(end, self._tokens)) - start] = True
        if end > self._tokens:
            begins[self.stream.starts(0, end - self._tokens) + (self._tokens - start)] = True
        return begins


class UnpackedDataset:
    """One document a sample: cut after ``sequence_length`` + 1 tokens, or padded.

    Samples carry different numbers of labels that count: min(tokens of the document - 1, sequence_length).
    Padding comes after the document, where causal attention cannot see it, so ``document`` is None.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self._places = np.arange(sequence_length, dtype=np.int64)
        self._places.setflags(write=False)
        self._pad = stream.eod or 0

    def __len__(self) -> int:
        return self.stream.documents

    def sample(self, index: int, epoch: int) -> Row:
        """See ``SampleDataset.sample``. The same in every epoch."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        length = self.sequence_length
        start, end = self.stream.start(index), self.stream.start(index + 1)
        real = min(end - start, length + 1)
        window = np.full(length + 1, self._pad, np.int64)
        window[:real] = self.stream.read(start, start + real)
        labels = window[1:].copy()
        labels[max(real - 1, 0) :] = IGNORE
        return window[:length], labels, self._places, None
