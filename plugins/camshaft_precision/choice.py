"""Which linear layers are computed in fp8, by their names and sizes. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from camshaft.errors import Problem

if TYPE_CHECKING:
    from camshaft.estimate import Sizes
    from camshaft.models.config import ModelConfig
    from camshaft.models.shapes import ParameterShape

MULTIPLE = 16
"""Of elements: what the kernels need of the two sizes of the second matrix (documentation of ``scaled_mm``: its
strides are multiples of 16 bytes)."""


def inner(names: Sequence[str], layers: str, count: int) -> list[str]:
    """Those of ``names`` that are in layers of the list ``layers``, but not in the first and the last of ``count``."""
    ends, prefix = {0, count - 1}, f"{layers}."
    return [name for name in names if name.startswith(prefix) and _number(name[len(prefix) :]) not in ends]


def _number(rest: str) -> int:
    return int(rest.split(".")[0])


def without(names: Sequence[str], keep: Sequence[str]) -> list[str]:
    """Those of ``names`` that no pattern of ``keep`` matches."""
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in keep)]


def idle(names: Sequence[str], keep: Sequence[str], key: str) -> Iterator[Problem]:
    """Patterns that keep nothing out; ``names``: of all linear layers of the model."""
    for index, pattern in enumerate(keep):
        if not any(fnmatchcase(name, pattern) for name in names):
            yield Problem(
                f"no linear layer is called '{pattern}'; there are, for example, {', '.join(names[-3:]) or 'none'}",
                key=f"{key}.fp8.keep.{index}",
                fix="correct or remove it; a `*` stands for anything",
            )


def nothing_left(count: int, key: str) -> Problem:
    """The fault of a recipe that keeps all of ``count`` layers out."""
    return Problem(
        f"no linear layer is left for fp8, of {count}",
        key=f"{key}.fp8.keep",
        fix=f"name fewer of them in {key}.fp8.keep, for example ['lm_head'], or set {key}.compute=bf16",
    )


def unusable(name: str, reason: str, key: str) -> Problem:
    """The fault of a layer that cannot be computed in fp8."""
    return Problem(
        f"'{name}' {reason}",
        key=f"{key}.fp8.keep",
        fix=f"keep it out of fp8, with a pattern in {key}.fp8.keep (which replaces the default), or set "
        f"{key}.compute=bf16",
    )


def faults(config: ModelConfig, keep: Sequence[str] | None, key: str) -> Iterator[Problem]:
    """What fp8 cannot do with the built-in decoder, however it is divided."""
    from camshaft.models.shapes import parameter_shapes

    shapes = _linear(parameter_shapes(config))
    names = tuple(shapes)
    strange = tuple(idle(names, keep or (), key))
    yield from strange
    found = _chosen(names, keep, config)
    if not found:
        yield nothing_left(len(names), key)
    if not strange:
        yield from _odd(found, shapes, "", key)


def uneven(config: ModelConfig, keep: Sequence[str] | None, sizes: Sizes, key: str) -> Iterator[Problem]:
    """The first layer on rank ``sizes.rank`` whose part fp8 cannot compute."""
    shapes = _linear((*(sizes.parameters or ()), *sizes.borrowed))
    yield from _odd(_chosen(tuple(shapes), keep, config), shapes, f" on rank {sizes.rank}", key)


def chosen(config: ModelConfig, keep: Sequence[str] | None) -> list[str]:
    """The built-in decoder's linear layers that are computed in fp8."""
    from camshaft.models.shapes import parameter_shapes

    return _chosen(tuple(_linear(parameter_shapes(config))), keep, config)


def _linear(parameters: Iterable[ParameterShape]) -> dict[str, tuple[int, ...]]:
    """Linear layer to the shape of its weight."""
    from camshaft.models.stages import LLAMA

    return {
        name.removesuffix(".weight"): each.shape
        for each in parameters
        for name in (each.name, *each.tied)
        if len(each.shape) == 2 and name.removesuffix(".weight") not in LLAMA.before
    }


def _chosen(names: Sequence[str], keep: Sequence[str] | None, config: ModelConfig) -> list[str]:
    from camshaft.models.stages import LLAMA

    return inner(names, LLAMA.layers, config.num_hidden_layers) if keep is None else without(names, keep)


def _odd(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], where: str, key: str) -> Iterator[Problem]:
    """The first of ``names`` with a size that is no multiple."""
    name = next((each for each in names if any(size % MULTIPLE for size in shapes[each])), None)
    if name is not None:
        rows, columns = shapes[name]
        reason = f"has {columns} inputs and {rows} outputs{where}, and fp8 needs multiples of {MULTIPLE}"
        yield unusable(name, reason, key)
