"""Whether a recipe takes what a sweep varies: every value that is named is tried before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camshaft.errors import Problem, RecipeError
from camshaft.recipe import Resolved, check, load
from camshaft.recipe.emit import flow

if TYPE_CHECKING:
    from camshaft.sweep.file import SweepFile

Values = Mapping[str, Any]
_DATA = ("data.train", "data.validation.")
"""Faults of what is read do not count: agents may be where the data are."""
_OVERRIDE = re.compile(r"override (\d+)\b.*")


def changes(parameters: Values) -> list[str]:
    """Values as overrides of a recipe."""
    return [f"{key}={flow(value)}" for key, value in parameters.items()]


def base(file: SweepFile, recipe: Path) -> Resolved:
    """The recipe with what all trials have.

    Raises:
        RecipeError: it cannot be read, or is refused; what an override is at fault for has its key in the sweep's file.
    """
    if not recipe.is_file():
        fix = "paths start at the folder of this file"
        raise RecipeError(Problem(f"there is no file '{recipe}'", key="recipe", fix=fix))
    try:
        return load(recipe, file.overrides)
    except RecipeError as error:
        raise RecipeError([_of_the_sweep(problem, len(file.overrides)) for problem in error.problems]) from None


def _of_the_sweep(problem: Problem, overrides: int) -> Problem:
    found = _OVERRIDE.fullmatch(problem.file)
    if found is None or int(found[1]) > overrides:
        return problem
    message = f"{problem.key}: {problem.message}" if problem.key else problem.message
    return replace(problem, file="", line=None, key=f"overrides.{int(found[1]) - 1}", message=message)


def refused(file: SweepFile, recipe: Path) -> list[Problem]:
    """What the recipe says to the values of each parameter, with keys of the sweep's file.

    Tried beside the first values of the other parameters and beside their last ones: what one of the two takes is a
    choice that makes sense. Faults that the recipe has whatever is chosen keep their places.
    """
    corners = [{key: each.named()[place] for key, each in file.parameters.items()} for place in (0, -1)]
    ends = [_faults(file, recipe, corner) for corner in corners]
    always = [problem for problem in _faults(file, recipe, {}) if all(problem in end for end in ends)]
    found = [_of_the_sweep(problem, len(file.overrides)) for problem in always]
    for key, each in file.parameters.items():
        told = []
        for value in each.named():
            beside = [_faults(file, recipe, {**corner, key: value}) for corner in corners]
            fresh = [[problem for problem in faults if problem not in always] for faults in beside]
            told += [(value, _nearest(fresh[0], key))] if all(fresh) else []
        found += _told(key, told, len(each.named()))
    return found


def _faults(file: SweepFile, recipe: Path, values: Values) -> list[Problem]:
    try:
        found: Sequence[Problem] = check(load(recipe, [*file.overrides, *changes(values)])).problems
    except RecipeError as error:
        found = error.problems
    return [problem for problem in found if not problem.key.startswith(_DATA)]


def _nearest(problems: Sequence[Problem], key: str) -> Problem:
    """The one that is about ``key``, if there is one."""
    return next((problem for problem in problems if problem.key == key), problems[0])


def _told(key: str, told: Sequence[tuple[Any, Problem]], count: int) -> Iterable[Problem]:
    """A line for each value, or one for all of them where it is the key that is refused."""
    same = len({problem.message for _, problem in told}) == 1 and len(told) == count
    for value, problem in told[:1] if same else told:
        message = problem.message if problem.key in (key, "") else f"{problem.key}: {problem.message}"
        head = "" if same else f"{flow(value)} is refused: "
        yield Problem(f"{head}{message}", key=f"parameters.{key}", fix=problem.fix)
