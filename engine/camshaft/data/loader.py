"""Samples to tensors. What a window holds is a pure function of (dataset, seed, consumed samples).

Consumed samples, not steps or ranks, say where a run is: sample number g of the run is place g mod n of
epoch g div n, for an epoch of n samples. A window of micro-batch m on part r of the batch holds g =
consumed + m * (degree * micro) + r * micro + j, so the ranks together always read the same samples in the
same order, whatever their number.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camshaft.data.permutation import Permutation
from camshaft.data.samples import IGNORE, SampleDataset
from camshaft.state import BatchPlan

_AHEAD = 2


@dataclass(slots=True)
class Batch:
    """One micro-batch, [b, s] each.

    ``tokens``, ``labels`` (-100: does not count) and ``positions`` are int64; ``document`` is int32, equal
    where attention is allowed, or None for plain causal attention. ``weight`` is the number of labels that
    count. Where a pipeline runs the model in parts, ``stage`` is the part to run (None: all of it), and ``hidden``
    what the stage before made of this microbatch (None in the first).
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document: Tensor | None
    weight: int
    stage: int | None = None
    hidden: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; asynchronous from pinned memory."""
        if self.tokens.device == device:
            return self
        return self._map(lambda part: part.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The batch in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        document = None if self.document is None else change(self.document)
        return Batch(change(self.tokens), change(self.labels), change(self.positions), document, self.weight)


@dataclass(slots=True)
class Window:
    """This rank's part of one optimizer step.

    ``batches``: one for each microbatch, all of the full shape; rows that a short last window lacks have no
    label that counts. ``weight``: labels that count, of this rank. ``samples`` and ``tokens`` (samples x
    sequence_length): of the whole window over all ranks, without missing rows.
    """

    batches: list[Batch]
    weight: int
    samples: int
    tokens: int


class _Rows:
    """Fills arrays [n, s] with samples; what is not filled stays a row without labels."""

    def __init__(self, dataset: SampleDataset) -> None:
        self._dataset = dataset
        tokens, _, _, document = dataset.sample(0, 0)
        self.length, self._masked = len(tokens), document is not None
        self._positions = np.arange(self.length, dtype=np.int64)

    def assemble(self, places: list[tuple[int, int] | None]) -> _Arrays:
        """Rows for (index, epoch) each; None gives a row of zeros with labels that do not count."""
        shape = (len(places), self.length)
        tokens, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        positions = np.empty(shape, np.int64)
        document = np.zeros(shape, np.int32) if self._masked else None
        for row, place in enumerate(places):
            if place is None:
                positions[row] = self._positions
                continue
            tokens[row], labels[row], positions[row], ids = self._dataset.sample(*place)
            if document is not None and ids is not None:
                document[row] = ids
        return _Arrays(tokens, labels, positions, document)


@dataclass(slots=True)
class _Arrays:
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    document: NDArray[np.int32] | None

    def batch(self, start: int, stop: int) -> Batch:
        labels = self.labels[start:stop]
        return Batch(
            torch.from_numpy(self.tokens[start:stop]),
            torch.from_numpy(labels),
            torch.from_numpy(self.positions[start:stop]),
            None if self.document is None else torch.from_numpy(self.document[start:stop]),
            int(np.count_nonzero(labels != IGNORE)),
        )


class Loader:
    """Windows of one rank, made ahead of time by one thread.

    Args:
        dataset: what is read. Unless it has a true attribute ``shuffled``, every epoch is permuted by
        (seed, epoch). batch: sizes of micro-batch and window, and micro-batches a window. index, degree:
        this rank's part of the batch, of how many. seed: chooses the order. stop: samples after which the
        data ends; None for never. device: where the tensors go.

    Raises:
        RecipeError: (also from ``next``) the data cannot be trained on.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        batch: BatchPlan,
        *,
        index: int,
        degree: int,
        seed: int,
        stop: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch.micro_batch_size * batch.accumulation * degree != batch.global_batch_size:
            raise ValueError(f"{batch} does not fit {degree} part(s)")
        self._dataset, self._batch, self._index, self._degree = dataset, batch, index, degree
        self._seed, self._stop, self._device = seed, stop, torch.device(device)
        self._rows = _Rows(dataset)
        self._order: tuple[int, Permutation] | None = None
        self._ahead: _Ahead | None = None
        self.consumed = 0
        """Samples of all ranks that ``next`` has given so far."""
        self.wait_s = 0.0
        """Seconds that ``next`` has waited for data, in all."""

    def seek(self, consumed_samples: int) -> None:
        """Continue after the first ``consumed_samples`` samples of the run."""
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples is {consumed_samples}")
        self.close()
        self.consumed = consumed_samples

    def next(self) -> Window | None:
        """The next window, on the device; None when the data has ended."""
        if self._ahead is None:
            self._ahead = _Ahead(self._windows(self.consumed))
        began = time.perf_counter()
        window = self._ahead.take()
        self.wait_s += time.perf_counter() - began
        if window is None:
            return None
        self.consumed += window.samples
        window.batches = [batch.to(self._device) for batch in window.batches]
        return window

    def close(self) -> None:
        """Stop the thread. ``next`` starts it again where it was."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _windows(self, consumed: int) -> Iterator[Window]:
        while self._stop is None or consumed < self._stop:
            window = self._window(consumed)
            consumed += window.samples
            yield window

    def _window(self, consumed: int) -> Window:
        plan, micro = self._batch, self._batch.micro_batch_size
        end = consumed + plan.global_batch_size
        if self._stop is not None:
            end = min(end, self._stop)
        firsts = [consumed + (m * self._degree + self._index) * micro for m in range(plan.accumulation)]
        rows = [self._place(first + j) if first + j < end else None for first in firsts for j in range(micro)]
        arrays = self._rows.assemble(rows)
        batches = [arrays.batch(m * micro, (m + 1) * micro) for m in range(plan.accumulation)]
        if self._device.type == "cuda":
            batches = [batch.pin() for batch in batches]
        samples = end - consumed
        return Window(batches, sum(batch.weight for batch in batches), samples, samples * self._rows.length)

    def _place(self, sample: int) -> tuple[int, int]:
        """(index, epoch) of a sample of the run."""
        size = len(self._dataset)
        epoch, place = divmod(sample, size)
        if getattr(self._dataset, "shuffled", False):
            return place, epoch
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, Permutation(size, self._seed, "epoch", epoch))
        return self._order[1](place), epoch


class _Ahead:
    """Runs an iterator in a thread, up to two items ahead. Errors come out of ``take``."""

    def __init__(self, windows: Iterator[Window]) -> None:
        self._queue: queue.Queue[Window | BaseException | None] = queue.Queue(_AHEAD)
        self._closing = threading.Event()
        self._last: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(windows,), name="camshaft-loader", daemon=True)
        self._thread.start()

    def _run(self, windows: Iterator[Window]) -> None:
        try:
            for window in windows:
                self._queue.put(window)
                if self._closing.is_set():
                    return
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def take(self) -> Window | None:
        """The next item; None at the end, and again after it. Raises what the iterator raised, again and
        again.
        """
        item = self._last if self._ended else self._queue.get()
        if isinstance(item, Window):
            return item
        self._ended, self._last = True, item
        if item is not None:
            raise item
        return None

    def close(self) -> None:
        """Ask the thread to end, and wait until it has."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.005)


def evaluation_batches(
    dataset: SampleDataset,
    samples: int,
    micro_batch_size: int,
    index: int,
    degree: int,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """``samples`` samples (or all, if there are fewer) of epoch 0, spread evenly over the dataset, in fixed
    order.

    Row j of batch b on part ``index`` is sample (b * degree + index) * micro_batch_size + j of them. Every
    part gets the same number of batches, all of the full shape; rows beyond the last sample have no label
    that counts.
    """
    rows, size = _Rows(dataset), len(dataset)
    count = min(samples, size)
    for batch in range(-(-count // (degree * micro_batch_size))):
        first = (batch * degree + index) * micro_batch_size
        chosen = range(first, first + micro_batch_size)
        places = [(number * size // count, 0) if number < count else None for number in chosen]
        yield rows.assemble(places).batch(0, micro_batch_size).to(torch.device(device))
