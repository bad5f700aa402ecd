"""Schedules as CSV: a row is a rank, a cell an action (``F3@2``: forward of microbatch 3 in stage 2), in order.

A table that names no transfer is completed: sends, receives and what closes the window are put in. A table that names
one must name them all. Empty cells are left out, so that columns may be moments.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

from camshaft.program import CLOSING, TRANSFERS, Action, Kind
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.schedule import Schedule
from camshaft_pipeline.transfers import complete

_STAGE_FIRST = re.compile(r"(?P<stage>\d+)(?P<kind>[FBIW])(?P<microbatch>\d+)", re.ASCII)


@dataclass(frozen=True)
class Cell:
    """An action and where it stands; rows and columns count from 1."""

    row: int
    column: int
    action: Action


def write(schedule: Schedule) -> str:
    """The schedule's programs as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(str, program) for program in schedule.programs])
    return text.getvalue()


def read(text: str, name: str = "csv", source: str = "") -> Schedule:
    """The schedule that ``text`` writes down, completed but not checked as a whole: ``check_schedule`` does that.

    Stages are placed where their forwards are. ``source`` is the file's name, for messages.

    Raises:
        ScheduleError: a cell is no action, a stage is on no row or on two, or transfers cannot be put in; with row
            and column.
    """
    where = f"{source}, " if source else ""
    rows = _cells(text, where)
    placement = _placement(rows, where)
    programs = [tuple(cell.action for cell in row) for row in rows]
    if not any(action.kind in TRANSFERS for program in programs for action in program):
        return complete(name, placement, programs)
    closing = tuple(Action(kind) for kind in CLOSING)
    if not any(action.kind in CLOSING for program in programs for action in program):
        programs = [(*program, *closing) for program in programs]
    return Schedule(name, placement, tuple(programs))


def _cells(text: str, where: str) -> list[list[Cell]]:
    rows = []
    for row, words in enumerate(csv.reader(io.StringIO(text)), start=1):
        cells = [
            Cell(row, column, _action(word.strip(), f"{where}row {row}, column {column}"))
            for column, word in enumerate(words, start=1)
            if word.strip()
        ]
        if not cells:
            raise ScheduleError(f"{where}row {row} is empty", fix="give each rank one row, and remove other lines")
        rows.append(cells)
    if not rows:
        raise ScheduleError(f"{where}the table has no row", fix="give each rank a row of actions, such as F0,B0")
    return rows


def _action(word: str, where: str) -> Action:
    try:
        return Action.parse(word)
    except ValueError as error:
        found = _STAGE_FIRST.fullmatch(word)
        fix = f"write {found['kind']}{found['microbatch']}@{found['stage']}" if found else ""
        raise ScheduleError(f"{where}: {error}", fix=fix) from None


def _placement(rows: list[list[Cell]], where: str) -> tuple[int, ...]:
    """The row of each stage's forwards, as a rank."""
    first: dict[int, Cell] = {}
    for cell in (cell for row in rows for cell in row if cell.action.kind is Kind.F):
        known = first.setdefault(cell.action.stage, cell)
        if known.row != cell.row:
            raise ScheduleError(
                f"{where}row {cell.row}, column {cell.column}: {cell.action} is a forward of stage {cell.action.stage},"
                f" which row {known.row} has in column {known.column}",
                fix="keep all actions of a stage in one row",
            )
    stages = 1 + max(first, default=-1)
    for stage in range(max(stages, 1)):
        if stage not in first:
            raise ScheduleError(
                f"{where}no row has a forward of stage {stage}", fix="number the stages 0, 1, ... without a gap"
            )
    return tuple(first[stage].row - 1 for stage in range(stages))
