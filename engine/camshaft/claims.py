"""Who owns what: claims, plans, and the conflicts between them, found before any process group exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, get_args

from camshaft.errors import PluginError, Problem
from camshaft.host import usual

if TYPE_CHECKING:
    from camshaft.mesh import Axis, MeshShape
    from camshaft.models.config import ModelConfig
    from camshaft.recipe.schema import Recipe

Resource = Literal[
    "parameter.layout",
    "gradient.layout",
    "gradient.reduce",
    "optimizer.layout",
    "activation.layout",
    "module.implementation",
    "module.recompute",
]
"""What can be owned. The vocabulary is closed, so that two plugins that never heard of each other can collide."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A plugin will lay out, reduce or replace ``resource`` along mesh axis ``axis`` for names matching ``target``.

    ``target`` is a glob over parameter or module names. Two claims collide when resource and axis are equal and
    their targets overlap. ``axis`` is empty for resources that no axis divides (a module's implementation). Where the
    data axis has two halves, ``dp`` claims both.
    """

    resource: Resource
    axis: str = ""
    target: str = "*"

    def __str__(self) -> str:
        where = f"@{self.axis}" if self.axis else ""
        return f"{self.resource}{where}" + ("" if self.target == "*" else f" [{self.target}]")


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes of one element, as the precision policy will have them. Everything is fp32 unless a plugin says otherwise.

    ``gradient``: of summed gradients while they are kept until the step; ``reduce``: on the wire; ``master``: of the
    weights and values of the optimizer. Masters take memory of their own only where they are wider than parameters.
    ``compute``: of what matrix products take and make, as wide as it can be where the device decides.
    """

    param: int = 4
    gradient: int = 4
    reduce: int = 4
    master: int = 4
    compute: int = 4

    @property
    def master_copy(self) -> int:
        """Bytes of an element's master weight beside the parameter; 0 where the parameter is the master."""
        return 0 if self.master == self.param else self.master


@dataclass(frozen=True, slots=True)
class Plan:
    """What one plugin says before anything is built.

    ``requires`` and ``provides`` are names of facts that no claim expresses (``elementwise_optimizer``).
    ``problems`` are faults of its own: a size that does not divide, a device that lacks a feature.
    ``moments``: values of the master dtype that the optimizer keeps for each element, from the owner of ``optimizer``;
    ``widths``: from the owner of ``precision``. ``camshaft plan`` counts bytes with both.
    """

    claims: tuple[Claim, ...] = ()
    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    moments: float | None = None
    widths: Widths | None = None


WHOLE = frozenset({"parameter_sums", "whole_parameters"})
"""Facts that the core provides while nobody lays out what the optimizer updates: each parameter is there, whole."""

TOKENS = "divided_tokens"
"""``divided_tokens@tp``: the fact that hidden states between layers are divided over the tokens along that axis."""


@dataclass(frozen=True, slots=True)
class PlanContext:
    """All that ``plan`` may look at. Pure data, equal on every rank, made without torch."""

    recipe: Recipe
    mesh: MeshShape
    plugins: tuple[str, ...]
    device: str
    """``cpu``, ``cuda``, or ``any`` when the recipe is planned for a machine that is not this one."""
    config: ModelConfig | None = None
    """The built-in decoder as it will be built (``camshaft.models.names`` and ``.shapes`` tell what is in it); None
    where a plugin builds or may change the model, of which nothing is known yet, or where the section is at fault."""


def overlap(left: str, right: str) -> bool:
    """Whether two globs can match one name. Exact for literals and prefixes, and errs towards yes otherwise."""
    if not any(sign in left for sign in "*?["):
        return fnmatchcase(left, right)
    if not any(sign in right for sign in "*?["):
        return fnmatchcase(right, left)
    head_left, head_right = _literal_head(left), _literal_head(right)
    tail_left, tail_right = _literal_head(left[::-1]), _literal_head(right[::-1])
    return _prefix(head_left, head_right) and _prefix(tail_left, tail_right)


def _literal_head(glob: str) -> str:
    for index, sign in enumerate(glob):
        if sign in "*?[]":
            return glob[:index]
    return glob


def _prefix(left: str, right: str) -> bool:
    return left.startswith(right) or right.startswith(left)


def check(
    plans: Mapping[str, Plan], mesh: MeshShape, owners: Mapping[str, Sequence[str]] | None = None
) -> list[Problem]:
    """Every conflict between plans: colliding claims, unmet requirements, axes that nobody claims.

    ``plans`` maps plugin to plan in recipe order; ``owners`` maps slot to plugins, so that who should have provided
    what is missing can be named. Problems carry the recipe key of the plugin to change.

    Raises:
        PluginError: a claim on a resource or an axis that does not exist, which could collide with nothing.
    """
    for name, plan in plans.items():
        _check_words(name, plan, mesh)
    problems = [problem for plan in plans.values() for problem in plan.problems]
    problems += _collisions(plans, mesh)
    provided = {fact for plan in plans.values() for fact in plan.provides}
    if not any(claim.resource == "optimizer.layout" for plan in plans.values() for claim in plan.claims):
        provided |= WHOLE
    for name, plan in plans.items():
        problems += [_unmet(name, fact, plans, owners or {}) for fact in plan.requires if fact not in provided]
    return problems + _unclaimed(plans, mesh)


def _unmet(name: str, fact: str, plans: Mapping[str, Plan], slots: Mapping[str, Sequence[str]]) -> Problem:
    """A fact that nobody provides; one that the core would provide is missing because of who divides the optimizer.

    A fact of a slot (``elementwise_optimizer``) is one that the slot's owner lacks.
    """
    for slot, (owner, *_) in ((slot, names) for slot, names in slots.items() if names):
        if fact.endswith(f"_{slot}"):
            return Problem(
                f"plugin '{name}' needs '{fact}', which '{owner}', who owns the slot '{slot}', does not provide",
                key=f"plugins.{name}",
                fix=f"take another plugin in place of '{owner}', or remove '{name}'",
            )
    owners = [owner for owner, plan in plans.items() if any(c.resource == "optimizer.layout" for c in plan.claims)]
    if fact in WHOLE and owners:
        return Problem(
            f"plugin '{name}' needs '{fact}', which '{owners[0]}', who lays out what the optimizer updates, does not "
            "provide",
            key=f"plugins.{name}",
            fix=f"take an optimizer that works element by element instead of '{name}', or remove '{owners[0]}'",
        )
    return Problem(
        f"plugin '{name}' needs '{fact}', which no enabled plugin provides",
        key=f"plugins.{name}",
        fix=f"enable a plugin that provides '{fact}', or remove '{name}'",
    )


def _unclaimed(plans: Mapping[str, Plan], mesh: MeshShape) -> list[Problem]:
    """Axes along which ranks would train apart; along those that split the batch somebody must reduce gradients."""
    claims = [claim for plan in plans.values() for claim in plan.claims]
    claimed = {axis for claim in claims for axis in _axes(claim, mesh)}
    reduced = {axis for claim in claims if claim.resource == "gradient.reduce" for axis in _axes(claim, mesh)}
    return [
        Problem(
            f"axis '{axis.name}' has degree {axis.degree}, and no enabled plugin "
            + (
                "reduces gradients along it: its ranks would train apart on different samples"
                if axis.name in claimed
                else "claims it: its ranks would train without ever exchanging anything"
            ),
            key=f"parallel.{axis.key}",
            fix=f"enable a plugin that works along '{axis.name}'{_example(axis)}, or set "
            + (
                f"launch.processes={mesh.world_size // axis.degree}"  # dp is what the other axes leave of them
                if axis.key == "data_parallel"
                else f"parallel.{axis.key}=1"
            ),
        )
        for axis in mesh.axes
        if axis.degree > 1 and axis.name not in (reduced if axis.splits_batch else claimed)
    ]


def _example(axis: Axis) -> str:
    """A line that claims the axis, as far as an installed plugin is the usual choice for it."""
    found = usual("data_parallel" if axis.splits_batch else axis.key)
    return "" if found is None else f" (plugins.{found[0]}: {found[1]})"


def _check_words(name: str, plan: Plan, mesh: MeshShape) -> None:
    for claim in plan.claims:
        if claim.resource not in get_args(Resource):
            known = ", ".join(get_args(Resource))
            raise PluginError(name, "plan", f"claims '{claim.resource}', which is no resource; there are: {known}")
        if claim.axis and claim.axis not in mesh.names:
            known = ", ".join(mesh.names)
            raise PluginError(name, "plan", f"claims {claim} on an axis that the mesh lacks; there are: {known}")


def _axes(claim: Claim, mesh: MeshShape) -> frozenset[str]:
    """Axes of the mesh that a claim is about; one empty name where no axis divides the resource."""
    return frozenset(mesh.members(claim.axis) if claim.axis else ("",))


def _collisions(plans: Mapping[str, Plan], mesh: MeshShape) -> list[Problem]:
    owned: Sequence[tuple[str, Claim]] = [(name, claim) for name, plan in plans.items() for claim in plan.claims]
    return [
        Problem(
            (
                f"plugins '{first}' and '{second}' both claim {claim}: only one plugin can own it"
                if claim.axis == other.axis
                else f"plugins '{first}' and '{second}' claim {claim} and {other}, which overlap: only one can own it"
            ),
            key=f"plugins.{second}",
            fix=f"remove one of them, for example with plugins.{second}=null",
        )
        for index, (first, claim) in enumerate(owned)
        for second, other in owned[index + 1 :]
        if first != second
        and claim.resource == other.resource
        and _axes(claim, mesh) & _axes(other, mesh)
        and overlap(claim.target, other.target)
    ]
