"""Streams, packing and blends: exact vectors by hand, and the properties that hold for any data."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from camshaft.data.blend import PERIOD, BlendedDataset, shares
from camshaft.data.indexed import IndexedDataset
from camshaft.data.packing import PackedDataset, UnpackedDataset
from camshaft.data.permutation import Permutation, number, shuffled
from camshaft.data.samples import IGNORE
from camshaft.data.stream import TokenStream
from camshaft.data.writer import IndexedWriter
from camshaft.errors import RecipeError

EOD = 0


def stream(folder, documents, *, eod=EOD, vocab=None, name="x"):
    with IndexedWriter(folder / name, np.dtype("<i4")) as writer:
        for one in documents:
            writer.add(one)
    return TokenStream(IndexedDataset(folder / name), vocab, eod)


def ragged(count=60, seed=0, low=0, high=25, end=True):
    """Documents of uneven length with distinct tokens from 1 on, each with an eod at its end if ``end``."""
    rng, following = np.random.default_rng(seed), 1
    documents = []
    for size in rng.integers(low, high, count).tolist():
        documents.append(list(range(following, following + size)) + [EOD] * end)
        following += size
    return documents


def flat(documents):
    return [token for one in documents for token in one]


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 1023, 1024, 1025, 1999, 2000])
def test_permutation_is_a_bijection(size):
    permutation = Permutation(size, 7, size)
    assert sorted(map(permutation, range(size))) == list(range(size))


def test_permutation_depends_on_its_key_and_moves_values():
    orders = [[Permutation(500, seed, epoch)(n) for n in range(500)] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    for order in orders:
        fixed = sum(place == value for place, value in enumerate(order))
        assert fixed < 12  # Poisson with mean 1
        # No trend is left: rank correlation with the input within five standard deviations.
        assert abs(np.corrcoef(order, np.arange(500))[0, 1]) < 5 / 500**0.5


def test_permutation_refuses_places_outside():
    for bad in (-1, 10):
        with pytest.raises(IndexError):
            Permutation(10, 0)(bad)
    with pytest.raises(ValueError, match="at least one"):
        Permutation(0, 0)


def test_hashes_are_fixed_forever():
    """A change here would silently change the order of every run that is resumed."""
    assert number(0, 1, "rotation") == 13363278627036241372
    assert number(0, 1, "rotation") != number(0, "1", "rotation")
    assert [Permutation(10, 0, "epoch", 0)(n) for n in range(10)] == [3, 7, 0, 6, 1, 9, 4, 2, 5, 8]
    assert shuffled(10, "documents").tolist() == [7, 4, 5, 0, 2, 6, 8, 9, 1, 3]


@pytest.mark.parametrize("end", [True, False])
def test_stream_is_the_documents_each_with_one_eod(tmp_path, end):
    documents = ragged(end=end)
    expected = flat(one if end else [*one, EOD] for one in documents)
    view = stream(tmp_path, documents)
    assert view.append is not end
    assert len(view) == len(expected) == view.start(view.documents)
    assert view.read(0, len(view)).tolist() == expected
    for low in range(0, len(view), 7):
        for high in (low + 1, low + 2, low + 13, len(view)):
            if high <= len(view):
                assert view.read(low, high).tolist() == expected[low:high]


def test_without_a_known_eod_documents_stay_as_they_are(tmp_path):
    documents = ragged(end=False)
    view = stream(tmp_path, documents, eod=None)
    assert view.read(0, len(view)).tolist() == flat(documents)


def test_split_shares_no_document_and_loses_none(tmp_path):
    for end in (True, False):
        whole = stream(tmp_path, ragged(200, end=end))
        for fraction in (1e-6, 0.05, 0.5, 0.999999):
            head, tail = whole.split(fraction)
            assert head.documents > 0 < tail.documents
            joined = np.concatenate([head.read(0, len(head)), tail.read(0, len(tail))])
            assert joined.tolist() == whole.read(0, len(whole)).tolist()
        head, tail = whole.split(0.05)
        assert 0.03 < len(tail) / len(whole) < 0.07


def test_packed_rows_by_hand(tmp_path):
    """Documents 1 2 3 0 | 4 0 | 0 | 5 6 7 8 0, cut every 5 tokens; the last row holds two tokens and padding."""
    packed = PackedDataset(stream(tmp_path, [[1, 2, 3, 0], [4, 0], [0], [5, 6, 7, 8, 0]]), 5, seed=0)
    assert len(packed) == 3
    rows = [[part.tolist() for part in packed.sample(index, 0)] for index in range(3)]
    x = IGNORE
    assert rows[0] == [[1, 2, 3, 0, 4], [2, 3, 0, x, 0], [0, 1, 2, 3, 0], [0, 0, 0, 0, 1]]
    assert rows[1] == [[0, 0, 5, 6, 7], [x, x, 6, 7, 8], [0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert rows[2] == [[8, 0, 0, 0, 0], [0, x, x, x, x], [0, 1, 0, 1, 2], [0, 0, 1, 1, 1]]


def test_packed_rows_without_document_mask(tmp_path):
    """The stream is a ring: the last token's label is the first token."""
    packed = PackedDataset(stream(tmp_path, [[1, 2, 3, 0], [4, 0]]), 4, seed=0, document_mask=False)
    first, second = packed.sample(0, 0), packed.sample(1, 0)
    assert [part.tolist() for part in first[:3]] == [[1, 2, 3, 0], [2, 3, 0, 4], [0, 1, 2, 3]]
    assert [part.tolist() for part in second[:3]] == [[4, 0, 0, 0], [0, 1, IGNORE, IGNORE], [0, 1, 2, 3]]
    assert first[3] is second[3] is None


def test_padding_is_a_document_of_its_own_also_where_an_epoch_ends_inside_one(tmp_path):
    packed = PackedDataset(stream(tmp_path, [[*range(1, 90), EOD], [100, EOD]]), 40, seed=0)
    epoch = next(epoch for epoch in range(1, 9) if 2 < packed.rotation(epoch) < 80)
    tokens, labels, positions, document = (part.tolist() for part in packed.sample(2, epoch))
    real = 92 - 80
    assert labels[real - 1] == tokens[real - 1] + 1, "the ring goes on inside the document that the epoch began in"
    assert labels[real:] == [IGNORE] * (40 - real)
    assert document[real] == document[real - 1] + 1
    assert document[real:] == [document[real]] * (40 - real)
    assert positions[real:] == list(range(40 - real))


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 10_000])
@pytest.mark.parametrize("mask", [True, False])
def test_every_epoch_holds_every_token_once(tmp_path, length, mask, end):
    view = stream(tmp_path, ragged(end=end))
    packed = PackedDataset(view, length, seed=5, document_mask=mask)
    text = view.read(0, len(view)).tolist()
    for epoch in range(3):
        rows = [packed.sample(index, epoch) for index in range(len(packed))]
        tokens = np.concatenate([row[0] for row in rows])[: len(view)].tolist()
        turn = packed.rotation(epoch)
        assert tokens == text[turn:] + text[:turn]
        labels = np.concatenate([row[1] for row in rows])
        assert np.count_nonzero(labels >= 0) == len(view) - view.documents * mask
        assert all(len(part) == length for row in rows for part in row[:3])
    assert len({packed.rotation(epoch) for epoch in range(3)}) == 3


def test_labels_positions_and_documents_agree_with_the_document_of_every_token(tmp_path):
    """Distinct tokens tell the document that they belong to; checked for each place of several epochs."""
    documents = ragged(80, low=1)
    owner = {token: number for number, one in enumerate(documents) for token in one if token != EOD}
    packed = PackedDataset(stream(tmp_path, documents), 16, seed=1)
    for epoch in range(4):
        for index in range(len(packed) - 1):
            tokens, labels, positions, document = (part.tolist() for part in packed.sample(index, epoch))
            for place in range(15):
                same = document[place] == document[place + 1]
                assert labels[place] == (tokens[place + 1] if same else IGNORE)
                assert positions[place + 1] == (positions[place] + 1 if same else 0)
                assert same is (tokens[place] != EOD)
                if same and tokens[place + 1] != EOD:
                    assert owner[tokens[place]] == owner[tokens[place + 1]]
            assert positions[0] == document[0] == 0


def test_packed_and_unpacked_count_the_same_pairs(tmp_path):
    """With documents that fit, both give each (token, next token) pair of each document exactly once."""
    view = stream(tmp_path, ragged(70, high=20))

    def pairs(dataset, epoch):
        found = Counter()
        for index in range(len(dataset)):
            tokens, labels, *_ = dataset.sample(index, epoch)
            found.update((int(a), int(b)) for a, b in zip(tokens, labels, strict=True) if b >= 0)
        return found

    assert pairs(PackedDataset(view, 11, seed=0), 2) == pairs(UnpackedDataset(view, 20), 2)


@pytest.mark.parametrize("end", [True, False])
def test_unpacked_rows_by_hand(tmp_path, end):
    documents = [[1, 2], [3, 4, 5, 6, 7], [], [8, 9, 10]]
    view = stream(tmp_path, [one + [EOD] * end for one in documents])
    rows = [UnpackedDataset(view, 3).sample(index, 9) for index in range(4)]
    x = IGNORE
    assert [row[0].tolist() for row in rows] == [[1, 2, 0], [3, 4, 5], [0, 0, 0], [8, 9, 10]]
    assert [row[1].tolist() for row in rows] == [[2, 0, x], [4, 5, 6], [x, x, x], [9, 10, 0]]
    assert all(row[2].tolist() == [0, 1, 2] and row[3] is None for row in rows)


@pytest.mark.parametrize("kind", [PackedDataset, lambda view, length, seed: UnpackedDataset(view, length)])
def test_a_bad_id_met_while_reading_names_its_place(tmp_path, kind):
    dataset = kind(stream(tmp_path, [[1, 2, 3, 4, 5, 0], [1, 99, 2, 0]], vocab=50), 6, seed=0)
    dataset.sample(0, 0)
    with pytest.raises(RecipeError, match=r"x\.bin: token 7 \(byte 28\) has id 99"):
        dataset.sample(1, 0)


def test_shares_are_the_largest_remainders():
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([0.7, 0.2, 0.1], 10) == [7, 2, 1]
    assert shares([5], 8) == [8]
    assert sum(shares([0.123, 3.3, 17.0, 1e-3])) == PERIOD
    with pytest.raises(ValueError) as caught:
        shares([1.0, 1e-9])
    assert caught.value.args == (1,)


def blend(folder, seed=3):
    parts = [PackedDataset(stream(folder, ragged(20 + 9 * n, seed=n), name=str(n)), 8, seed) for n in range(3)]
    return BlendedDataset(parts, [0.5, 0.3, 0.2], seed), parts


def test_blend_counts_are_exact_over_a_period_and_fair_within(tmp_path):
    mixed, _ = blend(tmp_path)
    size = len(mixed)
    drawn = [mixed.locate(number % size, number // size)[0] for number in range(2 * PERIOD)]
    assert [drawn[:PERIOD].count(part) for part in range(3)] == shares([0.5, 0.3, 0.2])
    assert drawn[PERIOD:] == drawn[:PERIOD]
    assert abs(drawn[:2000].count(0) / 2000 - 0.5) < 0.06


def test_each_part_of_a_blend_is_read_through_before_it_repeats(tmp_path):
    mixed, parts = blend(tmp_path)
    size = len(mixed)
    seen: dict[tuple[int, int], list[int]] = {}
    for sample in range(12 * size):
        part, index, epoch = mixed.locate(sample % size, sample // size)
        seen.setdefault((part, epoch), []).append(index)
    for part in range(3):
        last = max(epoch for owner, epoch in seen if owner == part)
        assert last >= 4
        for epoch in range(last):
            assert sorted(seen[part, epoch]) == list(range(len(parts[part])))
        assert seen[part, 0] != seen[part, 1]


def test_blend_gives_the_samples_of_its_parts(tmp_path):
    mixed, parts = blend(tmp_path)
    assert len(mixed) == sum(map(len, parts))
    for index in (0, 5, len(mixed) - 1):
        part, own, epoch = mixed.locate(index, 7)
        for got, expected in zip(mixed.sample(index, 7), parts[part].sample(own, epoch), strict=True):
            assert np.array_equal(got, expected)
    other, _ = blend(tmp_path, seed=4)
    assert [mixed.locate(n, 0) for n in range(50)] != [other.locate(n, 0) for n in range(50)]
    with pytest.raises(IndexError):
        mixed.locate(len(mixed), 0)
