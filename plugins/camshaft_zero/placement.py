"""Which mesh axis divides what: the table of which DDP, ZeRO 1, 2, 3 and hybrid sharding are rows. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from camshaft.errors import Problem
from camshaft.mesh import stated_data_parallel
from camshaft_zero import naming

if TYPE_CHECKING:
    from camshaft.claims import PlanContext
    from camshaft_zero.options import Options

Where = Literal["replicate", "shard"]
KINDS = ("parameters", "gradients", "optimizer")
STAGES: Mapping[int, tuple[Where, Where, Where]] = {
    1: ("replicate", "replicate", "shard"),
    2: ("replicate", "shard", "shard"),
    3: ("shard", "shard", "shard"),
}
"""Rajbhandari et al., arXiv:1910.02054: what each stage divides, in the order of ``KINDS``."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What is divided along the two data axes; an axis is None where the mesh has none of that use.

    ``shard`` divides the optimizer's values (and gradients, parameters, if so said); along ``replicate`` ranks hold
    copies, except of the optimizer's values where ``optimizer_outer``.
    """

    shard: str | None
    replicate: str | None
    parameters: bool
    gradients: bool
    optimizer_outer: bool


def resolve(options: Options, axes: Sequence[str], key: str) -> tuple[Placement | None, list[Problem]]:
    """The placement that ``options`` ask for on data axes ``axes`` (one, or replicate and shard), or what is wrong."""
    if options.stage is not None and any(getattr(options, kind) is not None for kind in KINDS):
        given = next(kind for kind in KINDS if getattr(options, kind) is not None)
        message = f"`stage` says what is divided, and so does `{given}`"
        return None, [Problem(message, key=f"{key}.{given}", fix=f"remove one of {key}.stage and {key}.{given}")]
    wanted = {kind: getattr(options, kind) for kind in KINDS}
    if options.stage is not None:
        wanted = dict(zip(KINDS, STAGES[options.stage], strict=True))
    elif all(value is None for value in wanted.values()):
        return None, [Problem("says nothing of what to divide", key=key, fix=f"set {key}.stage=1, 2 or 3")]
    table, problems = _by_axis(wanted, axes, key)
    return (None, problems) if problems else _judge(table, axes, key)


def _by_axis(wanted: Mapping[str, Any], axes: Sequence[str], key: str) -> tuple[dict[str, list[bool]], list[Problem]]:
    """Axis to whether it divides parameters, gradients, optimizer. A plain word is meant for the axis of shards."""
    inner = axes[-1]
    table = {axis: [False] * len(KINDS) for axis in axes}
    problems = []
    for index, kind in enumerate(KINDS):
        value = wanted[kind] or "replicate"
        for axis, where in ({inner: value} if isinstance(value, str) else value).items():
            if axis not in table:
                known = ", ".join(axes)
                problems.append(
                    Problem(f"there is no data axis '{axis}' here", key=f"{key}.{kind}", fix=f"use {known}")
                )
            else:
                table[axis][index] = where == "shard"
    return table, problems


def _judge(table: dict[str, list[bool]], axes: Sequence[str], key: str) -> tuple[Placement | None, list[Problem]]:
    problems = []
    for axis, (parameters, gradients, optimizer) in table.items():
        if parameters > gradients or gradients > optimizer:
            what = "parameters, but not gradients" if parameters > gradients else "gradients, but not the optimizer"
            problems.append(
                Problem(
                    f"divides {what}, along '{axis}': a rank would update what it has no gradient of",
                    key=f"{key}.{'gradients' if parameters > gradients else 'optimizer'}",
                    fix=f"set {key}.optimizer=shard, and {key}.gradients=shard for parameters; or {key}.stage instead",
                )
            )
    if len(axes) == 1:
        axis = axes[0]
        parameters, gradients, optimizer = table[axis]
        placement = Placement(axis if optimizer else None, None if optimizer else axis, parameters, gradients, False)
        return (None, problems) if problems else (placement, [])
    outer, inner = axes
    if table[outer][0] or table[outer][1]:
        problems.append(
            Problem(
                f"divides {'parameters' if table[outer][0] else 'gradients'} along '{outer}', the axis of copies",
                key=f"{key}.{'parameters' if table[outer][0] else 'gradients'}",
                fix="raise parallel.data_parallel_shard instead; only the optimizer can be divided along both",
            )
        )
    parameters, gradients, optimizer = table[inner]
    if not optimizer:
        problems.append(
            Problem(
                f"divides nothing along '{inner}', the axis of shards",
                key=f"{key}.optimizer",
                fix=f"set {key}.optimizer=shard, or remove parallel.data_parallel_shard",
            )
        )
    placement = Placement(inner, outer, parameters, gradients, table[outer][2])
    return (None, problems) if problems else (placement, [])


def refusals(options: Options, placement: Placement, context: PlanContext, key: str) -> list[Problem]:
    """Options that would have no effect with this placement, or that its provider does not have."""
    found = []
    if stated_data_parallel(context.recipe.parallel) == 1:
        message = f"'{key.rpartition('.')[2]}' divides over the data axis, and the recipe gives that axis one rank"
        found.append(Problem(message, key=key, fix="set parallel.data_parallel=auto, or remove the plugin"))
    if options.reduce == "each" and not placement.gradients:
        message = "gradients are replicated, so they are summed once a window"
        found.append(Problem(message, key=f"{key}.reduce", fix=f"remove it, or set {key}.stage=2"))
    given = options.model_fields_set
    for name in ("units", "unit_size_mb", "reshard_after_forward", "prefetch"):
        if name in given and not placement.parameters:
            found.append(_without("parameters are not divided", name, key, f"{key}.stage=3"))
    if "prefetch" in given and options.prefetch and not options.overlap:
        found.append(_without("without overlap nothing is gathered ahead", "prefetch", key, f"{key}.overlap=true"))
    if "bucket_size_mb" in given and placement.parameters:
        found.append(_without("units are modules where parameters are divided", "bucket_size_mb", key, "unit_size_mb"))
    if "prefetch" in given and options.prefetch and not options.overlap:
        found.append(_without("overlap is off", "prefetch", key, f"{key}.overlap=true"))
    if options.provider == "torch":
        found += _torch_refusals(options, placement, context, key)
    elif placement.parameters:
        found += naming.faults(options, context, key)
    return found


def _torch_refusals(options: Options, placement: Placement, context: PlanContext, key: str) -> list[Problem]:
    found = []
    if context.mesh["dp"].degree == 1:
        message = "provider: torch divides over data ranks, and there is one"
        found.append(Problem(message, key=f"{key}.provider", fix=f"start more processes, or set {key}.provider=native"))
    if not placement.gradients or placement.optimizer_outer:
        message = "provider: torch divides gradients and optimizer, or parameters too, along the axis of shards only"
        found.append(Problem(message, key=f"{key}.provider", fix=f"set {key}.provider=native, or {key}.stage=2 or 3"))
    for axis in (context.mesh[name] for name in ("tp", "pp")):
        if axis.degree > 1:
            message = (
                f"provider: torch knows of data axes alone, and '{axis.name}' divides the model over {axis.degree}"
            )
            found.append(Problem(message, key=f"{key}.provider", fix=f"set {key}.provider=native"))
    for name in ("units", "unit_size_mb", "prefetch", "overlap", "bucket_size_mb"):
        if name in options.model_fields_set:
            found.append(_without("provider: torch decides it", name, key, f"{key}.provider=native"))
    return found


def _without(why: str, name: str, key: str, instead: str) -> Problem:
    return Problem(f"has no effect: {why}", key=f"{key}.{name}", fix=f"remove it, or use {instead}")
