"""From options and mesh to a checked schedule, and to what is wrong with them. No torch."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from camshaft.errors import Problem, RecipeError
from camshaft_pipeline import schedules, table
from camshaft_pipeline.checker import check_schedule
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.schedule import Schedule
from camshaft_pipeline.splitting import check_depth, stages_of_names

if TYPE_CHECKING:
    from camshaft.claims import PlanContext
    from camshaft_pipeline.options import Options

KEY = "plugins.pipeline"
LONG = 2**12
"""Forwards of a window from which on a schedule takes so long to make that what can be known before is looked at."""


def schedule_of(options: Options, ranks: int, microbatches: int) -> Schedule:
    """The whole schedule, every program checked.

    Raises:
        ScheduleError: there is none for these numbers, or the table is at fault.
    """
    if options.table is not None:
        return _from_table(options.table, ranks, microbatches)
    return _made(options.schedule, ranks, microbatches, options.virtual_stages)


@lru_cache(maxsize=8)
def _made(name: str, ranks: int, microbatches: int, virtual_stages: int | None) -> Schedule:
    schedule = schedules.make(name, ranks, microbatches, virtual_stages)
    check_schedule(schedule, microbatches)
    return schedule


@lru_cache(maxsize=8)
def _from_table(path: str, ranks: int, microbatches: int) -> Schedule:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ScheduleError(f"'{path}' cannot be read: {error.strerror}", fix="give the path of a CSV file") from error
    except ValueError as error:  # a path with a NUL, bytes that are no UTF-8
        raise ScheduleError(f"{path} is not UTF-8 text", fix="give the path of a CSV file") from error
    schedule = table.read(text, Path(path).stem, path)
    if schedule.ranks != ranks:
        raise ScheduleError(
            f"{path} has {schedule.ranks} rows, and the pipeline has {ranks} ranks",
            fix=f"set parallel.pipeline_parallel={schedule.ranks}, or give a table with {ranks} rows",
        )
    if schedule.microbatches != microbatches:
        raise ScheduleError(
            f"{path} has {schedule.microbatches} microbatches, and a step has {microbatches}",
            fix="set batch.global_batch_size so that micro x accumulation x batch-parallel ranks gives as many",
        )
    check_schedule(schedule, microbatches)
    return schedule


def problems(options: Options, context: PlanContext) -> tuple[Problem, ...]:
    """Everything that is wrong with the options, for this mesh, batch and model."""
    ranks = context.mesh["pp"].degree
    if ranks == 1:
        return (
            Problem(
                "'pipeline' works along the pipeline axis alone, and the recipe gives that axis one rank",
                key=KEY,
                fix="remove plugins.pipeline, or set parallel.pipeline_parallel=2 or more",
            ),
        )
    return tuple(itertools.chain(_option_problems(options), _schedule_problems(options, context, ranks)))


def _option_problems(options: Options) -> list[Problem]:
    found = []
    given = [name for name in ("schedule", "virtual_stages") if name in options.model_fields_set]
    if options.table is not None and given:
        found.append(
            Problem(
                f"'{given[0]}' has no effect beside 'table', which holds the whole schedule",
                key=f"{KEY}.{given[0]}",
                fix=f"remove it, or remove {KEY}.table",
            )
        )
    split = options.split
    lists = [name for name in ("layers", "starts", "times") if getattr(split, name) is not None]
    chosen = [*lists, *(["balance"] if "balance" in split.model_fields_set else [])]
    if len(chosen) > 1:
        found.append(
            Problem(
                f"{' and '.join(chosen)} say different things of one split",
                key=f"{KEY}.split",
                fix=f"keep one of them, for example {chosen[0]}",
            )
        )
    return found


def _schedule_problems(options: Options, context: PlanContext, ranks: int) -> list[Problem]:
    from camshaft.recipe.checks import batch_plan

    try:
        microbatches = batch_plan(context.recipe, context.mesh).accumulation
    except RecipeError:  # told where batches are checked
        return []
    try:
        stages = ranks * (options.virtual_stages or 1)
        if context.config is not None and options.table is None and stages * microbatches > LONG:
            check_depth(context.config.num_hidden_layers, stages)
        schedule = schedule_of(options, ranks, microbatches)
    except RecipeError as error:
        return list(error.problems)
    except ScheduleError as error:
        return [error.problem(f"{KEY}.table" if options.table is not None else KEY)]
    if context.config is None:  # at fault, or of another model, which is looked at when it is built
        return []
    try:
        stages_of_names(context.config, options, schedule.stages)
    except RecipeError as error:
        return list(error.problems)
    return []
