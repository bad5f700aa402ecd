"""One proof: the small recipe beside one plain process, and beside textbooks of what that process shares with it."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camshaft.errors import MachineError, RecipeError
from camshaft.verify import bisect, covered
from camshaft.verify.code import code_digest
from camshaft.verify.judge import Comparison, Deviation, bounds_of, compare
from camshaft.verify.record import Recording
from camshaft.verify.runs import Failure, Outcome, Unequal, run
from camshaft.verify.shrink import Small, shrink
from camshaft.verify.sorting import TRAINING, Sorted, another_optimizer, full_world, legal, sort
from camshaft.verify.textbook import Textbooks

if TYPE_CHECKING:
    from camshaft.recipe import Checked, Resolved

STEPS = covered.FOUND_STEPS


@dataclass(frozen=True, slots=True)
class Finding:
    """What a recipe does wrong: the first sign of it, the plugin that makes it, and the smallest set that shows it."""

    sign: Deviation | Failure | Unequal
    plugins: tuple[str, ...]
    smallest: tuple[str, ...]
    by_formula: bool = False
    """Whether a textbook tells it, rather than the plain process."""

    def __str__(self) -> str:
        quoted = [f"'{name}'" for name in self.plugins or self.smallest]
        names = " and ".join(quoted) if self.plugins else f"one of {', '.join(quoted)}"
        if not quoted:
            names = "the core, without any plugin,"
        against = "its formula" if self.by_formula else "one plain process"
        lines = [f"{names} changes the numbers against {against}: {self.sign}"]
        if self.plugins and self.smallest != self.plugins:
            lines.append(f"smallest set of plugins that shows it: {', '.join(self.smallest) or '(none)'}")
        return "; ".join(lines)


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, and what came of it.

    ``shrunk`` is the small recipe as it follows from the recipe alone, ``small`` with a limit of gradients that is
    reached.
    """

    shrunk: Small
    small: Small
    sorted: Sorted
    comparison: Comparison | None
    finding: Finding | None
    world_size: int
    not_covered: tuple[str, ...]
    seconds: float
    trials: int = 0
    steps: int = STEPS
    extras: Mapping[str, Any] = field(default_factory=dict)
    code: str | None = None
    """Digest of the code when the proof began."""

    @property
    def green(self) -> bool:
        """Whether nothing was found."""
        return self.finding is None


class Bench:
    """Runs arrangements of one small recipe, each kind of plain process once.

    ``still``: without dropout, so that the plain process may take a whole window at once; with it, it takes the same
    microbatches, which draw the same numbers.
    """

    def __init__(self, small: Small, sorted_: Sorted, owners: Mapping[str, str], *, still: bool = True) -> None:
        self.small, self.sorted, self.owners, self.still = small, sorted_, owners, still
        self.bounds = bounds_of(small.compute, evaluates=small.evaluates)
        self.trials = 0
        self._plain: dict[tuple[str, ...], Outcome] = {}
        self._stand_in: str | None = None

    def plain(self, kept: Sequence[str]) -> Outcome:
        """One process with plugins ``kept`` alone, the whole window at once.

        Raises:
            RecipeError: they are not legal alone.
        """
        key = tuple(kept)
        if key not in self._plain:
            alone = dict.fromkeys(self.small.degrees, 1)
            resolved, ranks = self.small.arrange(key, alone, f"plain{len(self._plain)}", whole=self.still)
            self._plain[key] = run(resolved, ranks, self.small.compute, still=self.still)
        return self._plain[key]

    def look(self, names: Sequence[str]) -> Deviation | Failure | Unequal | Comparison:
        """What plugins ``names`` make of the numbers of one plain process; without an optimizer, of another one.

        Raises:
            RecipeError: they are not legal together.
        """
        self.trials += 1
        kept = [name for name in self.sorted.kept if name in names]
        if self.owners["optimizer"] not in names:
            self._stand_in = self._stand_in or another_optimizer(self.owners["optimizer"])
            self.small = replace(self.small, sections={**self.small.sections, self._stand_in: {"lr": 0.01}})
            names, kept = [*names, self._stand_in], [*kept, self._stand_in]
        degrees = self.sorted.left_alone(names, self.small.degrees)
        resolved, ranks = self.small.arrange(names, degrees, f"trial{self.trials}")
        own = self.sorted.precision in names
        plain, found = self.plain(kept), run(resolved, ranks, None if own else self.small.compute, still=self.still)
        for outcome in (plain, found):
            if not isinstance(outcome, Recording):
                return outcome
        assert isinstance(plain, Recording) and isinstance(found, Recording)
        comparison = compare(found, plain, self.bounds)
        return comparison if comparison.first is None else comparison.first


def verify(
    resolved: Resolved,
    *,
    steps: int = STEPS,
    device: str = "cpu",
    own_precision: bool = False,
    search: bool = True,
) -> Report:
    """Prove ``resolved`` on local ranks, which are forked from this process: it must have no process group.

    ``search``: find the plugin to blame where something is wrong. ``own_precision``: look once more in the recipe's own
    precision, which the plain process then has too.

    Raises:
        RecipeError: the recipe is not legal, or no smaller one of its plugins is.
        MachineError: ``device`` is ``cuda``, and there are fewer GPUs than ranks.
    """
    began = time.monotonic()
    world = full_world(resolved)
    checked = legal(resolved, world)
    sorted_ = sort(resolved, checked)
    with tempfile.TemporaryDirectory() as made:
        small = shrink(resolved, checked, sorted_, Path(made), steps=steps, device=device)
        code = code_digest(small.sections)
        _need_devices(small)
        owners, layers = _owners(checked), _layers(checked)
        report = _examine(small, sorted_, owners, search=search, steps=steps, layers=layers)
        if _shallow(report, layers):
            with contextlib.suppress(RecipeError):  # then it stays as shallow as it is
                small = shrink(resolved, checked, sorted_, Path(made), steps=steps, device=device, deep=True)
            again = _examine(small, sorted_, owners, search=search, steps=steps)
            report = replace(again, shrunk=report.shrunk)
        told = covered.of_recipe(resolved, checked, small, sorted_, steps)
        report = replace(report, not_covered=(*told, *report.not_covered), code=code)
        if own_precision and report.green:
            report = _in_own_precision(report)
    return replace(report, seconds=time.monotonic() - began)


def _layers(checked: Checked) -> int:
    assert checked.config is not None
    return checked.config.num_hidden_layers


def _shallow(report: Report, layers: int) -> bool:
    """Whether a small recipe was refused that has fewer layers than the recipe, whose plugins may name some of them."""
    sign = None if report.finding is None else report.finding.sign
    return isinstance(sign, Failure) and sign.refused and report.small.tree["model"]["num_hidden_layers"] < layers


def _need_devices(small: Small) -> None:
    if small.device != "cuda":
        return
    import torch

    ranks, gpus = math.prod(small.degrees.values()), torch.cuda.device_count()
    if gpus < ranks:
        raise MachineError(f"{ranks} ranks need as many GPUs, and this machine shows {gpus}: leave --on-gpu out")


def _in_own_precision(report: Report) -> Report:
    """Once more beside one process that has the recipe's precision too, within the bounds of narrow dtypes."""
    small, name = report.small, report.sorted.precision
    if name is None:
        return replace(report, not_covered=(*report.not_covered, "a precision of its own, which the recipe has not"))
    own = replace(small, sections={**small.sections, name: dict(small.own)})
    alone = dict.fromkeys(own.degrees, 1)
    plain = run(*own.arrange((*report.sorted.kept, name), alone, "own-plain", whole=True))
    found = run(*own.arrange(report.sorted.all, own.degrees, "own"))
    bounds = bounds_of(str(small.own.get("compute", "auto")), evaluates=small.evaluates)
    for outcome in (plain, found):
        if not isinstance(outcome, Recording):
            return replace(report, finding=Finding(outcome, (), report.sorted.compared))
    assert isinstance(plain, Recording) and isinstance(found, Recording)
    comparison = compare(found, plain, bounds)
    extras = {"own_precision": {key: each.value for key, each in comparison.worst.items()}}
    finding = None if comparison.first is None else Finding(comparison.first, (), report.sorted.compared)
    return replace(report, extras=extras, finding=finding)


def _owners(checked: Checked) -> dict[str, str]:
    """Slot of training to the plugin that owns it."""
    return {slot: names[0] for slot in TRAINING if (names := checked.owners.get(slot))}


def _examine(
    small: Small, sorted_: Sorted, owners: Mapping[str, str], *, search: bool, steps: int, layers: int = 0
) -> Report:
    """``layers`` of the recipe: where fewer of them are refused, nobody is blamed yet."""
    shrunk, bench = small, Bench(small, sorted_, owners)
    small = _clipping(bench)
    bench = bench if small is bench.small else Bench(small, sorted_, owners)
    resolved, ranks = small.all(sorted_)
    books = Textbooks(_kept(owners, sorted_), resolved.recipe.plugins, bench.bounds)
    plain = bench.plain(sorted_.kept)
    comparison, finding = None, None
    if isinstance(plain, Recording):
        wrong = books.first(plain)
        if wrong is not None:
            names = (wrong[0],) if wrong[0] else ()
            finding = Finding(wrong[1], names, names, by_formula=True)
    if finding is None:
        found = bench.look(sorted_.all)
        if isinstance(found, Comparison):
            comparison = found
        else:
            again = isinstance(found, Failure) and found.refused and small.tree["model"]["num_hidden_layers"] < layers
            finding = _blamed(bench, found, search=search and not again)
    left_out = tuple(
        f"the formula of '{name}', which carries no textbook: both runs share it" for name in books.missing
    )
    if isinstance(plain, Recording):
        left_out += tuple(covered.without_gradient(plain))
    if finding is None and isinstance(plain, Recording) and plain.dropouts:
        finding, note = _with_dropout(bench, search=search)
        left_out += (note,) if note else ()
    return Report(shrunk, small, sorted_, comparison, finding, ranks, left_out, 0.0, bench.trials, steps)


def _blamed(bench: Bench, found: Deviation | Failure | Unequal, *, search: bool) -> Finding:
    blamed, smallest = bisect.blame(bench, found) if search else ((), bench.sorted.all)
    return Finding(found, blamed, smallest)


def _with_dropout(bench: Bench, *, search: bool) -> tuple[Finding | None, str]:
    """Once more with dropout, along the axes whose ranks draw what one process draws; what that leaves out.

    Along data axes ranks draw numbers of their own.
    """
    own = {axis for axis in bench.small.degrees if axis.startswith("dp")}
    compared = tuple(
        name for name in bench.sorted.compared if not (axes := bench.sorted.axes.get(name)) or axes - own - {""}
    )
    small = replace(bench.small, degrees={axis: 1 if axis in own else d for axis, d in bench.small.degrees.items()})
    loud = Bench(small, replace(bench.sorted, compared=compared), bench.owners, still=False)
    try:
        found = loud.look(loud.sorted.all)
    except RecipeError as error:
        return None, f"dropout, because without data axes: {error.problems[0].message}"
    finding = None if isinstance(found, Comparison) else _blamed(loud, found, search=search)
    return finding, "dropout along data axes, where ranks draw numbers of their own"


def _kept(owners: Mapping[str, str], sorted_: Sorted) -> dict[str, str]:
    return {slot: name for slot, name in owners.items() if name in sorted_.kept and slot != "build_model"}


def _clipping(bench: Bench) -> Small:
    """The small recipe with a limit of gradients that is reached, if the recipe's own is not."""
    small, owner = bench.small, bench.owners.get("clip")
    section = small.sections.get(owner or "", {})
    plain = bench.plain(bench.sorted.kept)
    if owner not in bench.sorted.kept or not isinstance(plain, Recording) or not section.get("max_norm", 1.0):
        return small
    norms = [step.norm for step in plain.steps if step.norm is not None]
    if any(step.coefficient is not None and step.coefficient < 1 for step in plain.steps) or not norms:
        return small
    return replace(small, sections={**small.sections, owner: {**section, "max_norm": min(norms) / 2}})
