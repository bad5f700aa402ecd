"""Whether the model has what `exclude` names, and hidden matrices beside it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from camshaft.errors import Problem

if TYPE_CHECKING:
    from camshaft.models.config import ModelConfig


def idle(names: Sequence[str], exclude: Sequence[str], key: str) -> Iterator[Problem]:
    """Patterns that match none of ``names``, those of all parameters."""
    for index, pattern in enumerate(exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            yield Problem(
                f"'{pattern}' matches no parameter of the model",
                key=f"{key}.{index}",
                fix=f"remove it, or correct it; '{names[-1]}' is one of the names",
            )


def nothing_left(key: str) -> Problem:
    """The fault of a recipe that excludes every matrix."""
    return Problem("no hidden matrix is left that trains", key=key, fix="exclude less, or take another optimizer")


def faults(config: ModelConfig, exclude: Sequence[str], key: str) -> Iterator[Problem]:
    """What is wrong with patterns that a person wrote, for the built-in decoder."""
    from camshaft.models.names import parameter_names
    from camshaft.models.shapes import parameter_shapes
    from camshaft.models.stages import LLAMA

    yield from idle(parameter_names(config), exclude, key)
    matrices = [each.name for each in parameter_shapes(config) if len(each.shape) == 2]
    tables = tuple(f"{module}." for module in LLAMA.before)
    hidden = [name for name in matrices if not name.startswith(tables)]
    if not any(all(not fnmatchcase(name, pattern) for pattern in exclude) for name in hidden):
        yield nothing_left(key)
