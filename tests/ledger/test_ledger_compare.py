"""Finding the first difference, and whose it is: on records as ranks publish them, without ranks."""

import mmap
from itertools import permutations

import pytest

from camshaft.mesh import MeshShape
from camshaft.recipe.schema import Parallel
from camshaft_console.line import words
from camshaft_ledger.board import SLOTS, Board
from camshaft_ledger.book import Book, Key, size, table
from camshaft_ledger.compare import RULE, diverged
from camshaft_ledger.ledger import groups_of
from camshaft_ledger.sequence import Entry, Record, Sequence

SUM = Entry("ddp", "reduce", "dp", "all_reduce", "float32", 10)
NORM = Entry("clip", "clip", "dp", "all_reduce", "float64", 1)
SWAP = Entry("moe", "forward", "tp", "all_to_all", "bfloat16", 0)
GATHER = Entry("zero", "step", "dp", "all_gather", "float32", 10)


def flat(world_size):
    return [groups_of(MeshShape.of(Parallel(), world_size), rank) for rank in range(world_size)]


def square():
    """Two axes of two ranks: dp of 0, 2 and 1, 3; tp of 0, 1 and 2, 3."""
    shape = MeshShape.of(Parallel(tensor_parallel=2), 4)
    return [groups_of(shape, rank) for rank in range(4)]


def records(groups, *steps, first=5, ended=None):
    """Of every rank, from its calls in each step, ``[[rank 0's, rank 1's, ...], ...]``; the last step is under way."""
    found = {}
    for rank, own in enumerate(groups):
        mine = tuple((first + index, tuple(step[rank])) for index, step in enumerate(steps))
        found[rank] = Record(mine, own, (ended or {}).get(rank, ""))
    return found


def test_groups_are_those_of_the_mesh():
    joined = {"dp+tp": (0, 1, 2, 3)}
    assert square()[1] == {"pp": (1,), "dp": (1, 3), "cp": (1,), "tp": (0, 1), "world": (0, 1, 2, 3), **joined}
    cube = MeshShape.of(Parallel(tensor_parallel=2, pipeline_parallel=2), 8)
    found = groups_of(cube, 6)  # second in pp, second in dp, first in tp
    assert (found["pp+dp"], found["pp+tp"], found["dp+tp"]) == ((0, 2, 4, 6), (2, 3, 6, 7), (4, 5, 6, 7))
    assert found["pp+dp+tp"] == found["world"] and cube.joined("tp", "dp", "pp") == "pp+dp+tp"
    hybrid = MeshShape.of(Parallel(data_parallel_shard=2), 4)
    assert groups_of(hybrid, 3)["dp"] == (0, 1, 2, 3) and groups_of(hybrid, 3)["dp_replicate"] == (1, 3)


def test_ranks_that_are_behind_do_not_differ():
    usual = [SUM, NORM, GATHER]
    for behind in range(4):
        assert diverged(records(flat(2), [usual, usual], [usual, usual[:behind]])) is None
    # One whole step behind, and ranks of which one has nothing to say yet.
    late = records(flat(3), [usual] * 3, [usual] * 3, [[]] * 3)
    late[1] = Record(late[1].steps[:2], late[1].groups)
    assert diverged(late) is None
    assert diverged({2: late[2]}) is None and diverged({}) is None


def test_ranks_that_hold_other_steps_are_compared_where_they_overlap():
    steps = [[[SUM], [SUM]], [[SUM, NORM], [SUM, NORM]], [[SUM], [GATHER]]]
    found = records(flat(2), *steps)
    found[1] = Record(found[1].steps[1:], found[1].groups)
    assert diverged(found) == (
        f"rank 1, plugin zero, hook step: call 1 all_gather on dp; rank 0 did all_reduce on dp (plugin ddp, hook "
        f"reduce) (step 7). {RULE}"
    )


def test_the_majority_is_right():
    usual, odd = [SUM, NORM], [SUM, SUM._replace(op="broadcast")]
    for wrong in range(3):
        found = records(flat(3), [odd if rank == wrong else usual for rank in range(3)])
        text = diverged(found)
        assert text.startswith(f"rank {wrong}, plugin ddp, hook reduce: call 2 broadcast on dp; rank "), text


def test_of_two_ranks_history_decides():
    usual, odd = [SUM, NORM, GATHER], [SUM, GATHER]
    for wrong in range(2):
        now = [odd if rank == wrong else usual for rank in range(2)]
        text = diverged(records(flat(2), [usual, usual], now))
        assert text.startswith(f"rank {wrong}, plugin clip, hook clip: left out call 2 all_reduce on dp"), text
        # The right rank waits in the call: that something came after it is known from the step before.
        now[1 - wrong] = usual[:2]
        text = diverged(records(flat(2), [usual, usual], now))
        assert text.startswith(f"rank {wrong}, plugin clip, hook clip: left out call 2 all_reduce on dp"), text
        assert "went on to call 2 all_gather on dp of plugin zero, hook step" in text


def test_the_end_of_a_step_is_as_good_as_a_call():
    usual = [SUM, NORM]
    found = records(flat(2), [usual, [SUM]], [[], []])
    found[0] = Record(found[0].steps[:1], found[0].groups)
    text = diverged(found)
    assert text.startswith(
        "rank 1, plugin clip, hook clip: left out call 2 all_reduce on dp, which rank 0 did, and has "
    )
    assert "has finished step 5" in text
    text = diverged(records(flat(2), [usual, [SUM]], ended={1: "finished"}))
    assert text.startswith("rank 1, plugin clip, hook clip: left out call 2") and "has ended its run" in text
    assert diverged(records(flat(2), [usual, [SUM]], ended={1: "failed"})) is None, "its own error says more"


def test_only_calls_on_common_groups_are_compared():
    pipeline = [[SUM, SWAP], [SUM, SWAP], [SUM, NORM, SWAP, SWAP], [SUM, NORM, SWAP, SWAP]]
    groups = square()
    # Ranks 0 and 1 share tp but not dp; rank 2 (dp with 0) calls more on its tp, with 3: only dp must agree.
    found = records(groups, pipeline)
    text = diverged(found)
    assert text is None, text
    found = records(groups, [[SUM, SWAP], [SUM, SWAP], [SWAP, SUM], [SWAP, GATHER]])
    text = diverged(found)
    assert text.startswith("rank 3, plugin zero, hook step: call 2 all_gather on dp; rank 1 did all_reduce on dp"), text


def test_another_axis_is_told_apart_from_a_rank_that_is_behind():
    groups = square()
    calls = [[SUM, NORM], [SUM, SWAP], [SUM, NORM], [SUM, NORM]]
    assert diverged(records(groups, calls)) is None, "rank 1 could still come to dp"
    text = diverged(records(groups, calls, [[NORM], [], [], [NORM]]))
    assert text is not None and "rank 1" in text


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_text_does_not_depend_on_the_order_of_the_records(order):
    found = records(flat(3), [[SUM, NORM], [SUM, NORM], [SUM, GATHER]])
    text = diverged({rank: found[rank] for rank in order})
    assert text.startswith("rank 2, plugin zero, hook step: call 2 all_gather on dp; rank 0 did all_reduce on dp"), text


def test_sizes_are_shown_where_they_are_the_difference():
    found = records(flat(2), [[SUM], [SUM._replace(elements=12)]])
    assert "call 1 all_reduce of 12 float32 on dp; rank 0 did all_reduce of 10 float32 on dp" in diverged(found)


def test_a_record_survives_the_store():
    sequence = Sequence(flat(2)[1], keep_steps=3)
    sequence.begin(7)
    for step in range(5):
        sequence.add(SUM)
        sequence.add(NORM._replace(elements=step))
        sequence.end_step()
    sequence.end()
    record = sequence.record()
    assert Record.parse(record.dump()) == record
    assert [step for step, _ in record.steps] == [10, 11, 12] and record.steps[-1][1] == ()
    assert record.ended == "finished"


def test_hashes_differ_where_calls_do_and_only_on_their_axis():
    one, other, third = (Sequence(square()[0], 3) for _ in range(3))
    for sequence, calls in ((one, [SUM, SWAP, NORM]), (other, [SWAP, SUM, NORM]), (third, [NORM, SWAP, SUM])):
        numbers = [sequence.add(entry)[0] for entry in calls]
        assert sorted(numbers) == [1, 1, 2]
    assert one.hashes == other.hashes, "the order of calls on different axes is not compared by hash"
    assert one.hashes["dp"] != third.hashes["dp"] and one.hashes["tp"] == third.hashes["tp"]


def boards(world_size=2):
    groups = flat(world_size)
    memory = mmap.mmap(-1, Board.bytes_for(groups[0]))
    return [Board(memory, rank, own, frozenset(range(world_size))) for rank, own in enumerate(groups)]


def test_the_second_to_come_sees_the_difference():
    first, second = boards()
    for number in range(1, 3 * SLOTS):
        assert first.differs("dp", number, number * 77) is None, "nobody is there yet"
        assert second.differs("dp", number, number * 77) is None
    assert first.differs("dp", 3 * SLOTS, 5) is None and second.differs("world", 3 * SLOTS, 6) is None
    assert second.differs("dp", 3 * SLOTS, 6) == 0
    # A rank that is far ahead has written over what the other comes to now.
    assert first.differs("dp", 4 * SLOTS + 1, 9) is None and second.differs("dp", 3 * SLOTS + 1, 8) is None


def test_ranks_of_other_nodes_are_not_looked_at():
    groups = flat(2)
    memory = mmap.mmap(-1, Board.bytes_for(groups[0]))
    first, second = (Board(memory, rank, groups[rank], frozenset({rank})) for rank in range(2))
    assert first.differs("dp", 1, 5) is None and second.differs("dp", 1, 6) is None
    assert not first.level(), "what the other node does is not known"


def test_ranks_are_level_while_none_has_done_more_than_another():
    first, second, third = boards(3)
    assert first.level() and second.level()
    for board in (first, second, third):
        assert board.differs("dp", 1, 5) is None
        assert board.level() == (board is third)
    first.step(1)
    assert not first.level() and not third.level(), "the first has left a step that the others are in"
    second.step(1)
    third.step(1)
    assert first.level() and third.level()


def test_means_begin_anew_with_every_record_and_set_up_is_no_step():
    book, key = Book(), Key("zero", "dp", "all_gather")
    book.add(key, 1000.0)
    book.begin()
    for sent in (10, 30, 50, 70):
        book.add(key, sent)
        book.steps += 1
        metrics = book.metrics()
        if book.steps % 2 == 0:
            assert metrics["plugin/ledger/zero/dp/all_gather/bytes_per_step"] == {2: 20, 4: 60}[book.steps]
            assert metrics["plugin/ledger/bytes_per_step"] == {2: 20, 4: 60}[book.steps]
            assert metrics["plugin/ledger/zero/dp/all_gather/calls_per_step"] == {2: 1, 4: 1.5}[book.steps]
            book.add(key, 0)  # between the record and its mark: belongs to the next one
            book.mark()
    (row,) = book.summary()["rows"]
    assert (row["bytes"], row["bytes_per_step"], row["calls"]) == (1160, 40, 7)
    assert table(book.summary()).splitlines()[1].split() == [
        "zero",
        "dp",
        "all_gather",
        "1.5",
        "40",
        "B",
        "7",
        "1.133",
        "KiB",
    ]


def test_sizes_have_units():
    assert [size(value) for value in (0, 999, 1000, 2**20, 3.5 * 2**30, 2**50)] == [
        "0 B", "999 B", "0.9766 KiB", "1 MiB", "3.5 GiB", "1024 TiB",
    ]  # fmt: skip


def test_the_console_shows_the_sums_alone():
    record = {
        "progress/global_step": 3,
        "plugin/ledger/bytes_per_step": 5.0,
        "plugin/ledger/a/dp/send/bytes_per_step": 5.0,
    }
    assert words(record, 10) == ["step=3/10", "ledger/bytes_per_step=5"]
