"""The loader: windows depend on the seed and the consumed samples only, and no sample is lost or read twice."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from camshaft.data.loader import Loader, evaluation_batches
from camshaft.data.samples import IGNORE
from camshaft.errors import RecipeError
from camshaft.state import BatchPlan

LENGTH = 4


class Numbered:
    """``size`` samples that say which one they are: token 0 is the index, token 1 the epoch; weights are uneven."""

    def __init__(self, size, *, masked=True, shuffled=False, broken=()):
        self.size, self.masked, self.shuffled, self.broken = size, masked, shuffled, broken

    def __len__(self):
        return self.size

    def sample(self, index, epoch):
        if index in self.broken:
            raise RecipeError(f"sample {index} is broken")
        tokens = np.array([index, epoch, 7, 7], np.int64)
        labels = np.where(np.arange(LENGTH) <= index % LENGTH, 5, IGNORE)
        document = np.array([0, 0, 1, 1], np.int32) if self.masked else None
        return tokens, labels, np.array([0, 1, 0, 1], np.int64), document


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def real(batch):
    """(index, epoch) of the rows of a batch that are samples."""
    rows = (batch.labels != IGNORE).any(dim=1)
    return [tuple(row) for row in batch.tokens[rows, :2].tolist()]


def windows(dataset, plan, degree, *, start=0, stop=None, limit=None, seed=0):
    """For each window: the samples in the order of microbatch, rank, row; and the ranks' windows."""
    loaders = [Loader(dataset, plan, index=r, degree=degree, seed=seed, stop=stop) for r in range(degree)]
    found = []
    try:
        for loader in loaders:
            loader.seek(start)
        while limit is None or len(found) < limit:
            parts = [loader.next() for loader in loaders]
            if parts[0] is None:
                assert parts == [None] * degree
                break
            order = [one for m in range(plan.accumulation) for part in parts for one in real(part.batches[m])]
            found.append((order, parts))
    finally:
        for loader in loaders:
            loader.close()
    return found


def plan(micro, degree, total):
    assert total % (micro * degree) == 0
    return BatchPlan(micro, total, total // (micro * degree))


LAYOUTS = [(1, 1), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("degree", "micro"), LAYOUTS)
def test_windows_hold_the_same_samples_in_the_same_order_on_any_layout(degree, micro, masked):
    dataset = Numbered(29, masked=masked)
    reference = [order for order, _ in windows(dataset, plan(8, 1, 8), 1, stop=70)]
    found = windows(dataset, plan(micro, degree, 8), degree, stop=70)
    assert [order for order, _ in found] == reference
    everything = [one for order in reference for one in order]
    assert len(everything) == 70
    for epoch, count in ((0, 29), (1, 29), (2, 12)):
        indexes = [index for index, owner in everything if owner == epoch]
        assert len(set(indexes)) == len(indexes) == count
    assert [index for index, owner in everything if owner == 0] != list(range(29))
    for order, parts in found:
        for part in parts:
            assert part.samples == len(order)
            assert part.tokens == len(order) * LENGTH
            assert part.weight == sum(batch.weight for batch in part.batches)
            assert all(batch.tokens.shape == (micro, LENGTH) for batch in part.batches)
            assert all(batch.weight == int((batch.labels != IGNORE).sum()) for batch in part.batches)
            assert all((batch.document is None) is not masked for batch in part.batches)
        assert sum(part.weight for part in parts) == sum(index % LENGTH + 1 for index, _ in order)


def test_resume_is_exact_also_with_another_degree_and_batch():
    dataset = Numbered(23)
    reference = [one for order, _ in windows(dataset, plan(4, 1, 8), 1, stop=100) for one in order]
    consumed, found = 0, []
    for degree, micro, total in ((2, 2, 8), (4, 1, 4), (1, 3, 6), (2, 4, 16), (4, 2, 8)):
        for order, parts in windows(dataset, plan(micro, degree, total), degree, start=consumed, stop=100, limit=2):
            found += order
            consumed += parts[0].samples
    for order, _ in windows(dataset, plan(2, 2, 8), 2, start=consumed, stop=100):
        found += order
    assert found == reference


def test_short_last_window_keeps_its_shape_and_counts_only_what_is_there():
    ((_, parts),) = windows(Numbered(40), plan(2, 2, 8), 2, start=8, stop=13)
    assert [part.samples for part in parts] == [5, 5]
    assert [[len(real(batch)) for batch in part.batches] for part in parts] == [[2, 1], [2, 0]]
    empty = parts[1].batches[1]
    assert empty.weight == 0
    assert empty.tokens.shape == (2, LENGTH)
    assert (empty.labels == IGNORE).all()
    assert empty.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert empty.document.tolist() == [[0] * LENGTH] * 2


def test_a_rank_without_any_sample_still_gets_a_window():
    ((_, parts),) = windows(Numbered(40), plan(2, 4, 8), 4, start=0, stop=3)
    assert [part.weight > 0 for part in parts] == [True, True, False, False]
    assert all(part.batches[0].tokens.shape == (2, LENGTH) for part in parts)


def test_end_is_none_again_and_again_and_an_exact_multiple_has_no_extra_window():
    loader = Loader(Numbered(8), BatchPlan(4, 4, 1), index=0, degree=1, seed=0, stop=8)
    assert [loader.next() is None for _ in range(5)] == [False, False, True, True, True]
    assert loader.consumed == 8
    loader.seek(8)
    assert loader.next() is None
    loader.close()


def test_without_stop_the_data_go_on_with_a_new_order():
    orders = [order for order, _ in windows(Numbered(8), BatchPlan(8, 8, 1), 1, limit=4)]
    assert [{epoch for _, epoch in order} for order in orders] == [{0}, {1}, {2}, {3}]
    assert len({tuple(index for index, _ in order) for order in orders}) == 4
    other = [order for order, _ in windows(Numbered(8), BatchPlan(8, 8, 1), 1, limit=4, seed=1)]
    assert other != orders


def test_a_dataset_that_is_shuffled_is_taken_as_it_comes():
    ((order, _),) = windows(Numbered(8, shuffled=True), BatchPlan(8, 8, 1), 1, stop=8)
    assert order == [(index, 0) for index in range(8)]


def test_an_error_of_the_thread_comes_out_of_next_every_time():
    loader = Loader(Numbered(8, broken={5}, shuffled=True), BatchPlan(2, 2, 1), index=0, degree=1, seed=0)
    assert [real(loader.next().batches[0])[0][0] for _ in range(2)] == [0, 2]
    for _ in range(3):
        with pytest.raises(RecipeError, match="sample 5 is broken"):
            loader.next()
    loader.seek(6)
    assert real(loader.next().batches[0]) == [(6, 0), (7, 0)]
    loader.close()


def test_close_stops_a_thread_that_waits_and_next_goes_on_where_it_was():
    loader = Loader(Numbered(64, shuffled=True), BatchPlan(2, 2, 1), index=0, degree=1, seed=0)
    before = threading.active_count()
    assert real(loader.next().batches[0]) == [(0, 0), (1, 0)]
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before
    assert real(loader.next().batches[0]) == [(2, 0), (3, 0)]
    loader.close()
    assert loader.wait_s > 0


def test_the_thread_works_ahead_but_not_without_bound():
    read = []
    dataset = Numbered(1000, shuffled=True)
    original, enough = dataset.sample, threading.Event()

    def sample(index, epoch):
        read.append(index)
        if len(read) >= 1 + 2 * 4:
            enough.set()
        return original(index, epoch)

    dataset.sample = sample
    loader = Loader(dataset, BatchPlan(2, 2, 1), index=0, degree=1, seed=0)
    loader.next()
    assert enough.wait(10)  # one taken, two ready, one in the making, besides the row that showed the shape
    loader.close()
    assert len(read) <= 1 + 2 * 5


def test_a_plan_that_does_not_fit_the_degree_is_refused():
    with pytest.raises(ValueError, match="does not fit 3"):
        Loader(Numbered(8), BatchPlan(2, 8, 2), index=0, degree=3, seed=0)
    loader = Loader(Numbered(8), BatchPlan(2, 2, 1), index=0, degree=1, seed=0)
    with pytest.raises(ValueError, match="-1"):
        loader.seek(-1)


def test_tensor_types():
    loader = Loader(Numbered(8), BatchPlan(2, 4, 2), index=0, degree=1, seed=0, device=torch.device("cpu"))
    window = loader.next()
    loader.close()
    assert len(window.batches) == 2
    for batch in window.batches:
        assert {batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype} == {torch.int64}
        assert batch.document.dtype == torch.int32
        assert all(part.is_contiguous() for part in (batch.tokens, batch.labels, batch.positions, batch.document))
        assert batch.to(torch.device("cpu")) is batch
        moved = batch.to(torch.device("meta"))
        assert moved.document.device.type == moved.tokens.device.type == "meta"
        assert moved.weight == batch.weight


@pytest.mark.parametrize(("degree", "micro"), LAYOUTS)
@pytest.mark.parametrize("samples", [1, 7, 16, 23, 99])
def test_evaluation_reads_the_same_samples_on_any_layout(degree, micro, samples):
    dataset = Numbered(23)
    count = min(samples, 23)
    parts = [list(evaluation_batches(dataset, samples, micro, index, degree)) for index in range(degree)]
    assert {len(part) for part in parts} == {-(-count // (degree * micro))}
    order = [one for step in zip(*parts, strict=True) for batch in step for one in real(batch)]
    assert order == [(number * 23 // count, 0) for number in range(count)]
    assert len(set(order)) == count
    assert all(batch.tokens.shape == (micro, LENGTH) for part in parts for batch in part)
    assert sum(batch.weight for part in parts for batch in part) == sum(index % LENGTH + 1 for index, _ in order)
