"""Which layers are in which stage: arithmetic without torch, so that ``camshaft plan`` knows what a run will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from camshaft.errors import Problem, RecipeError
from camshaft.models.stages import LLAMA, Cuttable, Span, stage_of

if TYPE_CHECKING:
    from camshaft.models.config import ModelConfig
    from camshaft_pipeline.options import Options, Split

KEY = "plugins.pipeline.split"


def spans_of(
    split: Split, costs: Sequence[float], before: float, after: float, stages: int, layers: str = ""
) -> tuple[Span, ...]:
    """Every stage of a model, in order.

    Args:
        split: the recipe's wish.
        costs: elements of each layer; ``before`` and ``after``: of what comes before the first and after the last.
        stages: how many there are; each gets at least one layer.
        layers: name of the module that holds the layers, which `starts` must begin with; empty: any.

    Raises:
        RecipeError: the wish does not fit the model or the number of stages.
    """
    count = len(costs)
    check_depth(count, stages)
    if split.layers is not None:
        return _by_numbers(split.layers, count, stages)
    if split.starts is not None:
        return _by_starts(split.starts, count, stages, layers)
    if split.times is not None:
        costs, before, after = _times(split.times, count)
    elif split.balance == "layers":
        costs, before, after = (1.0,) * count, 0.0, 0.0
    ends = balanced(tuple(costs), before, after, stages)
    return _spans(ends, count)


def check_depth(layers: int, stages: int) -> None:
    """Refuse a model of fewer ``layers`` than ``stages``.

    Raises:
        RecipeError: it has.
    """
    if layers < stages:
        raise _refusal(
            f"{stages} stages, and the model has {layers} layers: each stage needs one",
            "lower parallel.pipeline_parallel or plugins.pipeline.virtual_stages, or use a deeper model",
            "plugins.pipeline",
        )


def stages_of_names(config: ModelConfig, options: Options, stages: int) -> dict[str, int]:
    """Stage of every parameter of the built-in decoder by its name; ``stages``: of all ranks together.

    Raises:
        RecipeError: as ``spans_of``.
    """
    from camshaft.models.shapes import parameter_shapes

    shapes = parameter_shapes(config)
    elements = {shape.name: shape.elements for shape in shapes}
    for shape in shapes:  # a tied table is held by both stages that use it
        elements |= dict.fromkeys(shape.tied, shape.elements)
    spans = spans_of(options.split, *costs_of(elements, config.num_hidden_layers, LLAMA), stages, LLAMA.layers)
    return {shape.name: stage_of(shape.name, spans, LLAMA) for shape in shapes}


def costs_of(elements: Mapping[str, int], layers: int, pipeline: Cuttable) -> tuple[list[float], float, float]:
    """Elements of each layer, and before and after all of them, from the elements of every parameter by name."""
    one_each = tuple(Span(index, index + 1, layers) for index in range(layers))
    costs, before, after = [0.0] * layers, 0.0, 0.0
    for name, count in elements.items():
        if name.startswith(f"{pipeline.layers}."):
            costs[stage_of(name, one_each, pipeline)] += count
        elif any(name.startswith(f"{part}.") for part in pipeline.after):
            after += count
        else:
            before += count
    return costs, before, after


@lru_cache(maxsize=64)
def balanced(costs: tuple[float, ...], before: float, after: float, stages: int) -> tuple[int, ...]:
    """Where each stage ends, so that the most expensive one is as cheap as can be.

    Among those the sum of squares decides, then the earliest ends: the same answer on every machine.
    """
    table = _Costs(costs, before, after)
    most, _ = _best(table, stages, None)
    return _best(table, stages, most)[1]


class _Costs:
    """Cost of a stage that has the layers from one number to another."""

    def __init__(self, costs: Sequence[float], before: float, after: float) -> None:
        self.count, self.before, self.after = len(costs), before, after
        self.sums = [0.0, *accumulate(costs)]

    def of(self, begin: int, end: int) -> float:
        cost = self.sums[end] - self.sums[begin]
        return cost + (self.before if begin == 0 else 0.0) + (self.after if end == self.count else 0.0)


Found = tuple[float, tuple[int, ...]]


def _best(costs: _Costs, stages: int, limit: float | None) -> Found:
    """(score, ends): the least maximum, or with ``limit`` the least sum of squares of stages that are not above it."""
    known: dict[int, Found] = {0: (0.0, ())}
    for stage in range(stages):
        left = stages - stage - 1
        ends = range(stage + 1, costs.count - left + 1) if left else (costs.count,)
        known = {end: found for end in ends if (found := _extend(costs, known, end, limit)) is not None}
    return known[costs.count]


def _extend(costs: _Costs, known: Mapping[int, Found], end: int, limit: float | None) -> Found | None:
    found = []
    for begin, (score, ends) in known.items():
        if begin < end:
            cost = costs.of(begin, end)
            if limit is None:
                found.append((max(score, cost), (*ends, end)))
            elif cost <= limit:
                found.append((score + cost * cost, (*ends, end)))
    return min(found, default=None)


def _spans(ends: Sequence[int], count: int) -> tuple[Span, ...]:
    return tuple(Span(begin, end, count) for begin, end in zip((0, *ends[:-1]), ends, strict=True))


def _by_numbers(layers: Sequence[int], count: int, stages: int) -> tuple[Span, ...]:
    if len(layers) != stages or sum(layers) != count:
        raise _refusal(
            f"{len(layers)} stages with {sum(layers)} layers in all, but there are {stages} stages and {count} layers",
            f"give {stages} numbers whose sum is {count}",
            f"{KEY}.layers",
        )
    return _spans(list(accumulate(layers)), count)


def _by_starts(starts: Sequence[str], count: int, stages: int, layers: str) -> tuple[Span, ...]:
    key, fix = f"{KEY}.starts", f"name the first layer of each of {stages} stages, from layer 0 on, in rising order"
    numbers = [_number(name, layers, f"{key}.{index}", fix) for index, name in enumerate(starts)]
    if len(numbers) != stages or numbers[0] != 0 or numbers != sorted(set(numbers)) or numbers[-1] >= count:
        raise _refusal(
            f"layers {numbers} cannot be the first ones of {stages} stages of a model with {count} layers", fix, key
        )
    return _spans([*numbers[1:], count], count)


def _number(name: str, layers: str, key: str, fix: str) -> int:
    head, _, tail = name.rpartition(".")
    if not tail.isdecimal():
        raise _refusal(f"'{name}' does not end with the number of a layer", fix, key)
    if layers and head != layers:
        raise _refusal(f"'{name}' is no layer of the model: they are called {layers}.0 and so on", fix, key)
    return int(tail)


def _times(times: Sequence[float], count: int) -> tuple[Sequence[float], float, float]:
    if not any(times):
        raise _refusal("all times are 0, which balances nothing", "give measured times, or remove them", f"{KEY}.times")
    if len(times) == count:
        return times, 0.0, 0.0
    if len(times) == count + 2:
        return times[1:-1], times[0], times[-1]
    raise _refusal(
        f"{len(times)} times for a model with {count} layers",
        f"give {count} times, or {count + 2} with what comes before and after the layers",
        f"{KEY}.times",
    )


def _refusal(message: str, fix: str, key: str) -> RecipeError:
    return RecipeError(Problem(message, key=key, fix=fix))
