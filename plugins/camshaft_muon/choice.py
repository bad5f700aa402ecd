"""Which parameters are hidden matrices: by role, less what a pattern excludes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch.nn import Module

from camshaft.errors import RecipeError
from camshaft.parts import Parts
from camshaft.state import World
from camshaft_muon.naming import idle


def candidates(world: World, model: Module, exclude: Sequence[str], explicit: bool, key: str) -> frozenset[str]:
    """Names whose role is that of a matrix and that no pattern of ``exclude`` matches. Equal on all ranks.

    A tied head goes by the name of its table, whose role is that of an embedding. ``explicit``: a person wrote the
    patterns, so each must match something.

    Raises:
        RecipeError: an explicit pattern matches nothing.
    """
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if explicit:
        every = _of_all_stages(world, every)
    problems = tuple(idle(every, exclude, key)) if explicit else ()
    if problems:
        raise RecipeError(problems)
    return frozenset(
        name
        for name, role in world.roles.items()
        if role == "matrix" and not any(fnmatchcase(name, pattern) for pattern in exclude)
    )


def _of_all_stages(world: World, own: list[str]) -> list[str]:
    """Names of the whole model's parameters, where ranks along ``pp`` have those of their own stages."""
    if world.mesh.degree("pp") == 1:
        return own
    import torch.distributed as dist

    every: list[list[str]] = [[] for _ in range(world.mesh.degree("pp"))]
    dist.all_gather_object(every, own, group=world.mesh.group("pp"))
    return [name for names in every for name in names]


def hidden(parts: Parts, names: Collection[str]) -> frozenset[str]:
    """Those of ``names`` that have pieces here and two dimensions: a stack of matrices is none."""
    pieces = (piece for part in parts for piece in part.pieces)
    return frozenset(piece.name for piece in pieces if piece.name in names and len(piece.shape) == 2)
