"""The file of a sweep: a recipe, what to change in it, and what to look at."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from camshaft.errors import Problem, RecipeError
from camshaft.recipe import Resolved, faults
from camshaft.recipe.nodes import Document, Node, Origin, plain
from camshaft.recipe.reader import read_file
from camshaft.recipe.schema import PositiveInt, RunName, Section
from camshaft.sweep import values

Scalar = str | int | float | bool | None
Number = Annotated[int | float, Field(allow_inf_nan=False)]
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+|seed|name")
_OURS = ("run", "name", "schema_version")
_MOST = 100_000
"""Values that the steps of a parameter may make: all of them are written out."""


class Span(Section):
    """Numbers between two others; whole ones if both bounds (and the step) are."""

    min: Number
    """Smallest value."""
    max: Number
    """Largest value."""
    log: bool = False
    """Choose the logarithm evenly."""
    step: Annotated[Number, Field(gt=0)] | None = None
    """Distance of neighbouring values, from `min` on."""

    @property
    def whole(self) -> bool:
        """Whether its values are integers."""
        return all(isinstance(number, int) for number in (self.min, self.max, self.step or 1))

    def named(self) -> list[Scalar]:
        """The values that the file names."""
        return [self.min, self.max]

    def grid(self) -> list[Scalar]:
        """Every value; there is a ``step``."""
        low, step = Decimal(str(self.min)), Decimal(str(self.step))
        kind = int if self.whole else float
        return [kind(low + place * step) for place in range(self.count)]

    @property
    def last(self) -> int | float:
        """The largest value: what its steps come to below ``max``, or that."""
        if self.step is None:
            return self.max
        found = Decimal(str(self.min)) + (self.count - 1) * Decimal(str(self.step))
        return int(found) if self.whole else float(found)

    @property
    def count(self) -> int:
        """How many values its steps make; there is a ``step``. Decimal: three steps of 0.1 end at 0.3."""
        assert self.step is not None
        return int((Decimal(str(self.max)) - Decimal(str(self.min))) / Decimal(str(self.step))) + 1


class Choice(Section):
    """One of a few values."""

    values: Annotated[list[Scalar], Field(min_length=1)]
    """What is chosen from."""

    def named(self) -> list[Scalar]:
        """The values that the file names."""
        return list(self.values)

    def grid(self) -> list[Scalar]:
        """Every value."""
        return list(self.values)


class Metric(Section):
    """What makes a trial good, as it is in its metrics.jsonl."""

    name: str = "eval/loss"
    """Name of the metric."""
    goal: Literal["minimize", "maximize"] = "minimize"
    """Which way is better."""
    of: Literal["last", "min", "max"] = "last"
    """Which of a trial's values counts."""


class Pruning(Section):
    """Stop trials that are worse than the median of earlier ones at the same step."""

    startup_trials: PositiveInt = 5
    """Finished trials before the first one may be stopped."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of a trial before it may be stopped."""


class SweepFile(Section):
    """The root of a sweep's file."""

    schema_version: Literal[1]
    """Version of this format."""
    name: RunName
    """Trials are in `<run.root of the recipe>/sweep-<name>`."""
    recipe: str
    """The recipe. Relative paths start at the folder of this file."""
    overrides: list[str] = []
    """What all trials have, as on the command line: `training.max_steps=200`."""
    method: Literal["bayes", "random", "grid"] = "bayes"
    """`bayes`: Optuna's TPE here, W&B's own there; `grid`: every combination, in the order of the parameters."""
    trials: PositiveInt | None = None
    """How many; raising it later continues the sweep. Needed but for `grid`, where it is a limit."""
    seed: int = 0
    """Decides what is chosen, trial by trial."""
    metric: Metric = Metric()
    pruning: Pruning | None = None
    parameters: Annotated[dict[str, Span | Choice], Field(min_length=1)]
    """Key of the recipe to what it is varied over."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep that was read and checked; ``recipe`` is the recipe's path, ``base`` the recipe with its overrides."""

    file: SweepFile
    path: Path
    recipe: Path
    base: Resolved

    @property
    def folder(self) -> Path:
        """Where its trials and its study are."""
        return Path(self.base.recipe.run.root) / f"sweep-{self.file.name}"

    @property
    def total(self) -> int:
        """Trials in all."""
        wanted = self.file.trials
        if self.file.method != "grid":
            assert wanted is not None
            return wanted
        size = prod(len(each.grid()) for each in self.file.parameters.values())
        return size if wanted is None else min(size, wanted)

    def identity(self) -> dict[str, Any]:
        """What must stay the same while a sweep goes on; the number of trials may grow."""
        return {**self.file.model_dump(mode="json", exclude={"trials"}), "recipe": self.base.dump()}


def read(path: Path) -> Sweep:
    """Read a sweep's file and try its recipe with every value that the file names.

    Raises:
        RecipeError: with every problem of the file, or of the recipe with these values.
    """
    document = read_file(path, str(path))
    tree = plain(document.root)
    try:
        file = SweepFile.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        found = faults.problems(error, tree, SweepFile, "", lambda key, section, value: None)
        raise RecipeError([*document.problems, *(_placed(document, problem) for problem in found)]) from None
    problems = [*document.problems, *(_placed(document, problem) for problem in _problems(file))]
    if problems:
        raise RecipeError(problems)
    recipe = path.parent / file.recipe
    try:
        base = values.base(file, recipe)
    except RecipeError as error:
        raise RecipeError([_placed(document, problem) for problem in error.problems]) from None
    problems = [_placed(document, problem) for problem in (*values.refused(file, recipe), *_unseen(file, base))]
    if problems:
        raise RecipeError(problems)
    return Sweep(file, path, recipe, base)


def _problems(file: SweepFile) -> list[Problem]:
    found = []
    if file.trials is None and file.method != "grid":
        found.append(Problem("must be given, unless method is grid", key="trials", fix="trials: 20"))
    if file.method == "grid" and file.pruning is not None:
        found.append(Problem("a grid tries every combination to its end", key="pruning", fix="remove it"))
    for place, override in enumerate(file.overrides):
        if override.partition("=")[0].split(".")[0] in _OURS:
            found.append(Problem("the sweep sets this for each trial", key=f"overrides.{place}", fix="remove it"))
    for key, each in file.parameters.items():
        where = f"parameters.{key}"
        if not _KEY.fullmatch(key) or key.split(".")[0] in _OURS:
            fix = "use keys as on the command line, for example batch.global_batch_size"
            found.append(Problem("no key of a recipe that a trial may set", key=where, fix=fix))
        elif isinstance(each, Span):
            found += _span_problems(each, where, file.method)
        elif len({json.dumps(value) for value in each.values}) < len(each.values):
            found.append(Problem("a value is there twice", key=f"{where}.values", fix="remove one"))
    return found


def _span_problems(span: Span, where: str, method: str) -> list[Problem]:
    found = []
    if span.min >= span.max:
        found.append(Problem(f"min {span.min} is not below max {span.max}", key=where, fix="swap them"))
    elif span.step is not None and span.count > _MOST:
        fix = "raise step, or remove it: then any number between the two may be chosen"
        found.append(Problem(f"steps of {span.step} make {span.count:,} values", key=f"{where}.step", fix=fix))
    if span.log and span.min <= 0:
        found.append(Problem("a logarithm needs min above 0", key=f"{where}.min", fix="raise min, or remove log"))
    if span.log and span.step is not None:
        found.append(Problem("log and step exclude each other", key=f"{where}.step", fix="remove one of them"))
    if method == "grid" and span.step is None:
        found.append(
            Problem("a grid needs a step or values here", key=where, fix="give step, or a list: values: [...]")
        )
    return found


def _unseen(file: SweepFile, base: Resolved) -> list[Problem]:
    """Why the metric would never be seen."""
    recipe, found = base.recipe, []
    if "jsonl" not in recipe.plugins:
        found.append(
            Problem("trials write no metrics.jsonl", key="recipe", fix="add the plugin jsonl: {} to the recipe")
        )
    if file.metric.name.startswith("eval/") and recipe.training.eval_every is None:
        found.append(
            Problem(
                f"{file.metric.name} is never measured: the recipe has no training.eval_every",
                key="metric",
                fix="add training.eval_every=... to overrides, or name another metric",
            )
        )
    return found


def _placed(document: Document, problem: Problem) -> Problem:
    """``problem`` with its line, unless it has a place already."""
    return _locate(document.root, problem.key).place(problem)


def _locate(root: Node, key: str) -> Origin:
    """Origin of ``key`` or of its nearest ancestor; keys of parameters hold dots themselves."""
    node, rest = root, key
    while rest:
        names = [name for name, _ in node.children() if rest == name or rest.startswith(f"{name}.")]
        child = node.get(max(names, key=len)) if names else None
        if child is None:
            break
        node, rest = child, rest[len(max(names, key=len)) + 1 :]
    return node.origin
