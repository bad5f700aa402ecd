"""Whether a plan agrees with a model, by the names of its modules and what each holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from camshaft.errors import Problem, RecipeError
from camshaft_tensor_parallel.division import box
from camshaft_tensor_parallel.styles import StylePlan

if TYPE_CHECKING:
    from camshaft.models.config import ModelConfig

NEEDED = ("embedding", "region", "logits", "loss")
"""What a model has to have where tokens are divided between regions."""

DROPOUT = "a dropout"
Held = Mapping[str, str]
"""Module to what it holds itself: ``parameters (weight)``, ``DROPOUT`` or nothing."""


def parameters(leaves: Collection[str]) -> str:
    """What a module holds that has these parameters; empty for none."""
    return f"parameters ({', '.join(leaves)})" if leaves else ""


def idle(globs: Collection[str], key: str) -> Iterator[Problem]:
    """The fault of globs that match nothing."""
    for glob in globs:
        yield Problem(f"no module of the model matches '{glob}'", key=f"{key}.{glob}", fix="correct or remove it")


def without_style(plan: StylePlan, held: Held) -> Iterator[Problem]:
    """Modules in a region that hold something, and of which nobody says what they work on."""
    for name, what in held.items():
        style = plan.style(name)
        if what and plan.region(name) and (style is None or style.kind == "region"):
            yield Problem(
                f"'{name or 'the model'}' has {what} in a region, and the plan does not say what it works on",
                key=plan.key,
                fix="name it there: inner if it sees a rank's own features, outer if it sees all of them"
                f"{', column or row if it is a product' if what != DROPOUT else ''}",
            )


def incomplete(plan: StylePlan, names: Collection[str], *, loss: bool, sequence: bool) -> Iterator[Problem]:
    """Styles that need each other. ``loss``: the last stage is among ``names``; ``sequence``: tokens are divided, and
    ``names`` are those of the whole model.
    """
    kinds = {style.kind for style in map(plan.style, names) if style is not None}
    if loss and ("logits" in kinds) != ("loss" in kinds):
        has, lacks = ("logits", "loss") if "logits" in kinds else ("loss", "logits")
        yield Problem(
            f"a module has the style {has}, and none has {lacks}: a loss of logits that are divided has to know it",
            key=plan.key,
            fix=f"give the module with the {'cross-entropy' if lacks == 'loss' else 'output projection'} that style",
        )
    missing = [kind for kind in NEEDED if kind not in kinds] if sequence else []
    if missing:
        yield Problem(
            f"sequence_parallel divides tokens from the embedding to the loss, and no module has the style "
            f"{' or '.join(missing)}",
            key=plan.key,
            fix="name these modules there, or set sequence_parallel=false",
        )


def tied_otherwise(first: str, name: str, key: str) -> Problem:
    """The fault of one parameter that would be divided in two ways."""
    return Problem(
        f"'{first}' and '{name}' are one parameter, and the plan divides them differently",
        key=key,
        fix="give both modules styles that divide it alike, such as embedding and logits",
    )


def faults(plan: StylePlan, config: ModelConfig, degree: int, *, sequence: bool) -> Iterator[Problem]:
    """Everything that keeps ``plan`` from dividing the built-in decoder over ``degree`` ranks."""
    from camshaft.models.names import module_names, parameter_names

    leaves: dict[str, list[str]] = {name: [] for name in module_names(config)}
    for name in parameter_names(config):
        module, _, leaf = name.rpartition(".")
        leaves[module].append(leaf)
    yield from idle(plan.idle(leaves), plan.key)
    yield from without_style(plan, {name: parameters(own) for name, own in leaves.items()})
    yield from incomplete(plan, leaves, loss=True, sequence=sequence)
    yield from _uneven(plan, config, degree)


def _uneven(plan: StylePlan, config: ModelConfig, degree: int) -> Iterator[Problem]:
    """The first parameter that cannot be divided, or not so that all of its users agree; layers are all alike."""
    from camshaft.models.shapes import parameter_shapes

    for each in parameter_shapes(config):
        try:
            found = box(each.name, each.shape, plan, degree, 0)
            other = next((name for name in each.tied if box(name, each.shape, plan, degree, 0) != found), None)
        except RecipeError as error:
            yield from error.problems
            return
        if other is not None:
            yield tied_otherwise(each.name, other, plan.key)
