"""Schedules as CSV: what is written is read again, and what cannot be read is named by row and column."""

from __future__ import annotations

import pytest

from camshaft_pipeline import table
from camshaft_pipeline.checker import check_schedule
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.schedule import without_transfers
from camshaft_pipeline.schedules import FAMILIES, make


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 3), (4, 9)])
def test_a_written_schedule_is_read_again(name, p, m):
    schedule = make(name, p, m)
    again = table.read(table.write(schedule), name)
    assert (again.name, again.placement, again.programs) == (name, schedule.placement, schedule.programs)
    assert again.peak is None and again.microbatches == m
    check_schedule(again, m)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_table_of_computations_is_completed(name):
    schedule = make(name, 3, 5)
    text = "\n".join(" , ".join(map(str, without_transfers(program))) for program in schedule.programs)
    assert table.read(text).programs == schedule.programs


def test_a_small_table_as_a_person_writes_it():
    """Empty cells are moments; a table with transfers may leave out what closes the window."""
    schedule = table.read("F0,F1,,,,B0,B1\n,F0@1,B0@1,F1@1,B1@1\n")
    assert table.write(schedule) == (
        "F0,SEND_F0,F1,SEND_F1,RECV_B0,B0,RECV_B1,B1,REDUCE,CLIP,STEP\n"
        "RECV_F0@1,F0@1,RECV_F1@1,B0@1,SEND_B0@1,F1@1,B1@1,SEND_B1@1,REDUCE,CLIP,STEP\n"
    )
    short = table.write(schedule).replace(",REDUCE,CLIP,STEP", "")
    assert table.read(short).programs == schedule.programs
    check_schedule(schedule, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F0,X0,B0", "row 1, column 2: 'X0' is no action; write F3 or F3@2 (microbatch 3, stage 2)"),
        ("F0,B0\n1F0,B0@1", "row 2, column 1: '1F0' is no action; write F3 or F3@2"),
        ("F0,B0\n1F0,B0@1", "Fix: write F0@1"),
        ("F0,B0\n\nF0@1,B0@1", "row 2 is empty. Fix: give each rank one row"),
        ("", "the table has no row. Fix: give each rank a row of actions"),
        ("F0,B0\nF0,B0", "row 2, column 1: F0 is a forward of stage 0, which row 1 has in column 1. Fix: keep all"),
        ("F0,B0\nF0@2,B0@2", "no row has a forward of stage 1. Fix: number the stages 0, 1, ... without a gap"),
        ("B0", "no row has a forward of stage 0"),
        ("F0,F1,B0\nF0@1,B0@1,F1@1,B1@1", "rank 0, B1: is missing, and so are I1 and W1"),
        ("F0,UNSHARD,B0", "rank 0, UNSHARD: has no place in a pipeline's schedule"),
        ("F1,B1,F0,B0\nF0@1,B0@1,F1@1,B1@1", "rank 0, B1: deadlock: rank 0 waits at B1"),
    ],
)
def test_a_faulty_table_is_named_by_place_and_fix(text, message):
    with pytest.raises(ScheduleError) as caught:
        table.read(text, source="mine.csv")
    assert message in str(caught.value)
    assert "mine.csv, " in str(caught.value) or caught.value.rank is not None


def test_a_table_with_some_of_its_transfers_is_not_completed_in_silence():
    text = table.write(make("1f1b", 2, 2)).replace("SEND_F1,", "")
    with pytest.raises(ScheduleError, match="rank 0, SEND_F1: is missing"):
        check_schedule(table.read(text), 2)
