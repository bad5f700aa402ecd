"""``camshaft plan``: what a run would be, phase by phase and rank by rank, without torch or any process group."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated

import typer

from camshaft.cli import finding, ranks
from camshaft.cli.console import OverridesArgument, RecipeArgument, WorldSizeOption, columns, say
from camshaft.errors import RecipeError
from camshaft.holding import places
from camshaft.hookspecs import BuildHooks
from camshaft.host import Host
from camshaft.plugin import HOOK_API
from camshaft.program import brief, window_program
from camshaft.recipe import check, load
from camshaft.recipe.checks import smallest_world

if TYPE_CHECKING:
    from camshaft.mesh import MeshShape
    from camshaft.recipe import Checked, Resolved

PLAN_ONLY = ("shapes", "misfits", "activations", "estimate")
PHASES = tuple(name for name in vars(BuildHooks) if not name.startswith("_") and name not in PLAN_ONLY)
"""Build hooks in the order in which a run calls them; those of ``PLAN_ONLY`` are asked before."""


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    app.command("plan")(plan)


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    world_size: WorldSizeOption = None,
    rank: Annotated[
        int | None,
        typer.Option(help="The rank whose place, peers, bytes and program are shown; default: the fullest."),
    ] = None,
) -> None:
    """Show what a rank holds and sends, phases, owners, claims and programs; nothing is built and nothing connects."""
    resolved = load(recipe, overrides or (), world_size=world_size)
    if world_size is None and resolved.recipe.launch.processes != "auto":
        world_size = resolved.recipe.launch.processes
    world_size = world_size or smallest_world(resolved.recipe)
    resolved, chosen = finding.chosen(resolved, world_size)
    checked = check(resolved, world_size, device="any").require()
    host = Host.of(resolved.recipe.plugins)
    shown = chosen + show(resolved, checked, host, rank)
    say(shown)
    say(f"plan digest  {hashlib.sha256(shown.encode()).hexdigest()[:16]}")


def show(resolved: Resolved, checked: Checked, host: Host, rank: int | None) -> str:
    """The whole plan as text; a pure function of recipe, plugins and world size."""
    assert checked.mesh is not None
    if rank is not None and not 0 <= rank < checked.mesh.world_size:
        size = checked.mesh.world_size
        raise RecipeError(f"there is no rank {rank} among {size}: give --rank 0 to {size - 1}")
    bytes_ = ranks.show(ranks.Ranks(checked, host), rank)
    return "\n\n".join(
        [_sizes(resolved, checked), bytes_, _phases(host), _claims(checked), _programs(checked, host, rank)]
    )


def _sizes(resolved: Resolved, checked: Checked) -> str:
    batch, mesh, config = checked.batch, checked.mesh, checked.config
    assert batch is not None and mesh is not None and config is not None  # a checked recipe has them
    length = resolved.recipe.data.sequence_length
    return "\n".join(
        [
            f"model        {config.num_parameters():,} parameters, {config.num_hidden_layers} layers",
            f"mesh         {_mesh(mesh)} = {mesh.world_size} rank(s)",
            (
                f"batch        global {batch.global_batch_size} = micro {batch.micro_batch_size} x accumulation "
                f"{batch.accumulation} x data ranks {mesh.batch_degree}"
            ),
            f"tokens       {batch.global_batch_size * length:,} a step ({length} a sample)",
            f"hooks        API {HOOK_API}",
        ]
    )


def _mesh(mesh: MeshShape) -> str:
    """Axes and degrees; the halves of a divided axis stand in brackets behind it."""
    texts: dict[str, str] = {}
    for axis in mesh.axes:
        whole = next((name for name in mesh.names if axis.name in mesh.members(name) and axis.name != name), axis.name)
        halves = " x ".join(f"{part.removeprefix(f'{whole}_')} {mesh[part].degree}" for part in mesh.members(whole))
        texts[whole] = f"{whole} {mesh[whole].degree}" + (f" ({halves})" if whole != axis.name else "")
    return " x ".join(texts.values())


def _phases(host: Host) -> str:
    rows = []
    for phase in PHASES:
        names = [name for name, _ in host.implementations(phase)]
        rows.append((phase, ", ".join(names) or "(core)"))
    return "phases, in order\n" + columns(("phase", "plugins, in order"), rows)


def _claims(checked: Checked) -> str:
    rows = [(name, str(claim)) for name, plan in checked.plans.items() for claim in plan.claims]
    owners = [(slot, names[0]) for slot, names in checked.owners.items() if names]
    claims = columns(("plugin", "claims"), rows) if rows else "(none)"
    return f"slots\n{columns(('slot', 'owner'), owners)}\n\nclaims\n{claims}"


def _programs(checked: Checked, host: Host, rank: int | None) -> str:
    """Ranks with the same program share a line. Those that differ along axes that split the batch alone have it."""
    mesh, batch = checked.mesh, checked.batch
    assert batch is not None and mesh is not None
    alike: dict[str, list[int]] = {}
    for index in places(mesh) if rank is None else [rank]:
        text = brief(window_program(host, mesh, index, batch.accumulation))
        alike.setdefault(text, []).append(index)
    if rank is not None:
        return f"program of one window\n{columns(('rank', 'actions'), [(str(rank), text) for text in alike])}"
    data = [axis.name for axis in mesh.axes if axis.splits_batch]
    rows = []
    for text, members in alike.items():
        everyone = sorted(other for member in members for other in mesh.along(member, *data))
        rows.append((f"{ranks.ranges(everyone, limit=4)}", text))
    return f"program of one window\n{columns(('rank', 'actions'), rows)}"
