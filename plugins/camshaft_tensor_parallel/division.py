"""Which rectangle of a parameter each rank has. Pure arithmetic: importing this imports no torch."""

from __future__ import annotations

from camshaft.boxes import Box
from camshaft.errors import Problem, RecipeError
from camshaft_tensor_parallel.styles import DIVIDED, Style, StylePlan

KEY = "parallel.tensor_parallel"


def bounds(size: int, unit: int, parts: int, index: int) -> tuple[int, int]:
    """First and last + 1 of what part ``index`` of ``parts`` has of ``size``, cut at multiples of ``unit``.

    Parts differ by one unit at most; later ones are the larger.
    """
    units = size // unit
    return index * units // parts * unit, (index + 1) * units // parts * unit


def box(name: str, shape: tuple[int, ...], plan: StylePlan, degree: int, rank: int) -> tuple[Box, tuple[int, ...]]:
    """The box of parameter ``name`` of the whole ``shape`` on ``rank`` of ``degree``, and its shape there.

    Raises:
        RecipeError: it cannot be divided so, with what would do.
    """
    style = plan.style(name.rpartition(".")[0])
    offset = [0] * len(shape)
    if style is None or style.kind not in DIVIDED or (style.kind == "row" and len(shape) < 2):
        return Box(shape, tuple(offset), degree), shape
    dimension = DIVIDED[style.kind]
    parts, index = sharing(name, shape[dimension], style, degree, rank, plan.key)
    start, stop = bounds(shape[dimension], style.unit, parts, index)
    offset[dimension] = start
    local = (*shape[:dimension], stop - start, *shape[dimension + 1 :])
    return Box(shape, tuple(offset), degree // parts), local


def sharing(name: str, size: int, style: Style, degree: int, rank: int, key: str = KEY) -> tuple[int, int]:
    """Into how many different parts ``size`` features are cut for ``degree`` ranks, and which one ``rank`` has.

    ``key``: of the plan, in the recipe.

    Raises:
        RecipeError: the features cannot be divided so.
    """
    units, rest = divmod(size, style.unit)
    what = "features" if style.unit == 1 else f"units of {style.unit} features"
    if rest:
        message = f"'{name}' has {size} features, which are not whole units of {style.unit}"
        raise _refusal(message, "correct the style", key)
    if style.kind == "shared" and units < degree:
        if degree % units:
            raise _refusal(f"{degree} ranks cannot share the {units} {what} of '{name}' evenly", _degrees(units))
        return units, rank * units // degree
    if units < degree or (style.unit > 1 and units % degree):
        raise _refusal(f"the {units} {what} of '{name}' cannot be divided over {degree} ranks", _degrees(units))
    return degree, rank


def _degrees(units: int) -> str:
    fitting = ", ".join(str(number) for number in range(1, units + 1) if units % number == 0)
    return f"set it to one of {fitting}"


def _refusal(message: str, fix: str, key: str = KEY) -> RecipeError:
    return RecipeError(Problem(message, key=key, fix=fix))
