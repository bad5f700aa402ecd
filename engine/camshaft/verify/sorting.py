"""Which plugins of a recipe are compared, which the plain process keeps too, and which no number follows from.

Nothing here knows a plugin by name: claims, slots and hooks say what a plugin is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import ValidationError

from camshaft.errors import PluginError, RecipeError
from camshaft.hookspecs import FAMILIES, RunHooks
from camshaft.host import Host, installed, plugin_class
from camshaft.plugin import PROJECT
from camshaft.recipe import check
from camshaft.recipe.checks import smallest_world

if TYPE_CHECKING:
    from camshaft.claims import Plan
    from camshaft.recipe import Checked, Resolved

TRAINING = ("optimizer", "lr", "clip", "build_model")
"""Slots whose owners say what is trained, and not how: the plain process has them as well."""
TELLING = ("log", "save", "load")
"""Hooks of plugins that tell or keep what a run does."""
BESIDE = frozenset(
    {*(name for name in vars(RunHooks) if not name.startswith("_")), "plan", "estimate", "bind", "post_step"}
)
"""Hooks that such a plugin may have besides: who has others too takes part in the step, and is compared."""
DATA = ("data.train", "data.validation.")
"""Where problems are about what a recipe reads, which a proof does not read."""
CHANGES_MODEL = "changes_model"
"""A fact that a plugin provides whose ``rewrite`` changes what is trained: the plain process keeps it."""
CHANGES_NUMBERS = "changes_numbers"
"""A fact that a plugin provides whose purpose is to change the numbers (lossy compression): nothing to compare."""
BY_DESIGN = "it changes the numbers by design, as its plan says"


@dataclass(frozen=True, slots=True)
class Sorted:
    """The plugins of a recipe, each list in recipe order.

    ``compared``: those that must change no number; ``kept``: those that the plain process has as well; ``precision``:
    the owner of that slot, which is compared too; ``left_out``: plugin to why it is in neither run; ``axes``: plugin
    to the axes that it claims; ``reduces``: to those of them along which it sums gradients.
    """

    compared: tuple[str, ...]
    kept: tuple[str, ...]
    precision: str | None
    left_out: Mapping[str, str]
    axes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    reduces: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def all(self) -> tuple[str, ...]:
        """Every plugin that runs."""
        return (*self.compared, *self.kept)

    def left_alone(self, names: Sequence[str], degrees: Mapping[str, int]) -> dict[str, int]:
        """``degrees`` with 1 for every axis that none of the plugins ``names`` works along."""
        claimed = frozenset().union(*(self.axes.get(name, frozenset()) for name in names))
        summed = frozenset().union(*(self.reduces.get(name, frozenset()) for name in names))
        return {
            axis: degree if axis in (summed if axis.startswith("dp") else claimed) else 1
            for axis, degree in degrees.items()
        }


def full_world(resolved: Resolved) -> int:
    """Processes of the recipe: as it says, or the fewest with which its data axis has more than one rank."""
    stated = resolved.recipe.launch.processes
    if stated != "auto":
        return stated
    least = smallest_world(resolved.recipe)
    plans = check(resolved, least).plans.values()
    divides = any(claim.axis == "dp" and claim.resource == "gradient.reduce" for plan in plans for claim in plan.claims)
    checked = check(resolved, least)
    return least * 2 if divides and checked.mesh is not None and checked.mesh["dp"].degree == 1 else least


def legal(resolved: Resolved, world_size: int) -> Checked:
    """What the checks of ``resolved`` found; its data need not be on this machine.

    Raises:
        RecipeError: it is not legal.
    """
    checked = check(resolved, world_size)
    unknown = checked.mesh is None or checked.batch is None or checked.config is None
    if unknown or any(not problem.key.startswith(DATA) for problem in checked.problems):
        checked.require()
    return checked


def sort(resolved: Resolved, checked: Checked) -> Sorted:
    """Sort the plugins of ``resolved``, a recipe that ``checked`` found legal."""
    host = Host.of(resolved.recipe.plugins)
    hooks = {hook: {name for name, _ in host.implementations(hook)} for hook in TRAINING}
    compared, kept, left_out = [], [], {}
    for name in host.plugins:
        plan = checked.plans.get(name)
        claims = () if plan is None else plan.claims
        trains = any(name in hooks[slot] for slot in TRAINING)
        if plan is not None and CHANGES_NUMBERS in plan.provides:
            left_out[name] = BY_DESIGN
        elif not claims and (trains or (plan is not None and CHANGES_MODEL in plan.provides)):
            kept.append(name)
        elif not claims and (own := hooks_of(host, name)) & set(TELLING) and own <= BESIDE:
            left_out[name] = f"it tells or keeps what a run does, and is in neither run ({', '.join(sorted(own))})"
        else:
            compared.append(name)
    precision = next(iter(checked.owners.get("precision", ())), None)
    axes, reduces = _axes(checked.plans, checked)
    return Sorted(tuple(compared), tuple(kept), precision, left_out, axes, reduces)


def hooks_of(host: Host, plugin: str) -> frozenset[str]:
    """Hooks that a plugin implements."""
    names = [name for family in FAMILIES for name in vars(family) if not name.startswith("_")]
    return frozenset(name for name in names if any(owner == plugin for owner, _ in host.implementations(name)))


def _axes(plans: Mapping[str, Plan], checked: Checked) -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]]]:
    """Axes of the mesh that each plugin claims, and those along which it sums gradients."""
    mesh = checked.mesh
    assert mesh is not None

    def members(plan: Plan, *, reduce: bool) -> frozenset[str]:
        named = [each for each in plan.claims if each.axis and (not reduce or each.resource == "gradient.reduce")]
        return frozenset(axis for claim in named for axis in mesh.members(claim.axis))

    return (
        {name: members(plan, reduce=False) for name, plan in plans.items()},
        {name: members(plan, reduce=True) for name, plan in plans.items()},
    )


def another_optimizer(name: str) -> str:
    """An installed plugin beside ``name`` that owns ``optimizer``, works element by element, and keeps least.

    Raises:
        RecipeError: there is none.
    """
    found: list[tuple[float, str]] = []
    for other in installed():
        kind = plugin_class(other)
        if other == name or not hasattr(getattr(kind, "optimizer", None), f"{PROJECT}_impl"):
            continue
        try:
            ((_, ask),) = Host({other: kind(kind.Options.model_validate({"lr": 0.01}))}).implementations("plan")
            plan = ask(None)
        except (ValidationError, ValueError, PluginError):
            continue  # it needs more than a rate, looks at the recipe, or plans nothing
        if "elementwise_optimizer" in plan.provides and not plan.claims:
            found.append((plan.moments or 0.0, other))
    if not found:
        raise RecipeError(f"no installed plugin can stand in for '{name}'")
    return min(found)[1]
