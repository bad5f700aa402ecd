"""Which parameters are hidden matrices: by role, less what a pattern excludes."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch.nn import Module

from camshaft.errors import Problem, RecipeError
from camshaft.state import World


def hidden_matrices(world: World, model: Module, exclude: Sequence[str], explicit: bool, key: str) -> frozenset[str]:
    """Names of the trained matrices that no pattern of ``exclude`` matches. Equal on all ranks.

    A tied head goes by the name of its table, whose role is that of an embedding. ``explicit``: a person wrote the
    patterns, so each must match something.

    Raises:
        RecipeError: nothing is left, or an explicit pattern matches nothing.
    """
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    idle = [pattern for pattern in exclude if not any(fnmatchcase(name, pattern) for name in every)]
    if explicit and idle:
        raise RecipeError(
            Problem(
                f"'{idle[0]}' matches no parameter of the model", key=key, fix=f"remove it, or correct it: {every[-1]}"
            )
        )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = frozenset(
        name
        for name, role in world.roles.items()
        if role == "matrix" and name in trained and not any(fnmatchcase(name, pattern) for pattern in exclude)
    )
    if not found:
        raise RecipeError(
            Problem("no hidden matrix is left that trains", key=key, fix="exclude less, or take another optimizer")
        )
    return found
