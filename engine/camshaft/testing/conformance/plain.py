"""The reference of a trial: one plain process, as ``camshaft.testing.reference`` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from camshaft.build import SINGLE, roles
from camshaft.data import prepare
from camshaft.host import Host
from camshaft.masters import whole_parts
from camshaft.mesh import Mesh
from camshaft.models.llama import Llama
from camshaft.recipe import check
from camshaft.rundir import RunDirectory
from camshaft.state import Policy, World
from camshaft.testing.record import StepRecord
from camshaft.testing.reference import plain_run

if TYPE_CHECKING:
    from camshaft.recipe import Resolved

POLICIES = {"fp64": Policy(*[torch.float64] * 4)}


def one_world(resolved: Resolved, compute: str) -> World:
    """The world of a single process on the CPU, in which nothing is divided."""
    checked = check(resolved, 1, device="cpu").require()
    assert checked.mesh is not None and checked.batch is not None
    return World(
        recipe=resolved.recipe,
        mesh=Mesh(checked.mesh, 0, None),
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        policy=POLICIES.get(compute, SINGLE),
        batch=checked.batch,
        run=RunDirectory(resolved.recipe.run.dir or ""),
        total_steps=1,
    )


def own_optimizer(resolved: Resolved, compute: str) -> Callable[[Llama], Optimizer]:
    """Builds the recipe's optimizer over the whole parameters of a plain model."""

    def make(model: Llama) -> Optimizer:
        world = one_world(resolved, compute)
        world.roles = roles(model)
        world.parts = whole_parts(model, world.roles)
        owner = Host.of(resolved.recipe.plugins).owner("optimizer")
        assert owner is not None
        made: Optimizer = owner[1](world, model)
        return made

    return make


def neighbours_lr(resolved: Resolved, plugin: str) -> Callable[[int, int], float] | None:
    """The factor on the learning rate by the textbook of the plugin that owns it, where that is not ``plugin``.

    Raises:
        LookupError: it has none.
    """
    from camshaft.verify.textbook import find

    owner = Host.of(resolved.recipe.plugins).owner("lr")
    if owner is None or owner[0] == plugin:
        return None
    book, options = find(owner[0]), resolved.recipe.plugins[owner[0]]
    if book is None:
        raise LookupError(f"plugin '{owner[0]}' owns the learning rate and has no textbook to hold it to")
    return lambda step, total: float(book.factor(options, step, total))


def records(
    resolved: Resolved,
    compute: str,
    max_norm: float | None,
    optimizer: Callable[[Llama], Optimizer] | None,
    **changes: Any,
) -> list[StepRecord]:
    """Every step of the plain process; ``optimizer`` in place of the recipe's own, ``changes`` as ``plain_run`` has."""
    chosen = optimizer or own_optimizer(resolved, compute)
    return plain_run(resolved, prepare(resolved), chosen, compute=compute, max_norm=max_norm, **changes)
