"""What ``validate`` says of a recipe that divides products. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from camshaft.claims import PlanContext
from camshaft.errors import Problem, RecipeError

KEY = "parallel.tensor_parallel"


def problems(options: Any, context: PlanContext, name: str) -> Iterator[Problem]:
    """Every fault of the options and of the sizes that they meet."""
    degree, key = context.mesh["tp"].degree, f"plugins.{name}"
    if degree == 1:
        yield Problem(
            f"'{name}' works along the tensor axis alone, and the recipe gives that axis one rank",
            key=key,
            fix=f"remove {key}, or set {KEY}=2",
        )
        return
    unsound = [*_styles(options, key), *_heads(context, degree)]
    yield from unsound
    if not unsound and context.config is not None:
        from camshaft_tensor_parallel.agreement import faults
        from camshaft_tensor_parallel.shapes import style_plan

        yield from faults(style_plan(options, context, key), context.config, degree, sequence=options.sequence_parallel)
    length = context.recipe.data.sequence_length
    if options.sequence_parallel and length % degree:
        yield Problem(
            f"samples of {length} tokens cannot be divided over {degree} ranks",
            key="data.sequence_length",
            fix=f"set it to a multiple of {degree} such as {length + -length % degree}, or set "
            f"{key}.sequence_parallel=false",
        )
    if options.overlap and not options.sequence_parallel:
        yield Problem(
            "there is no gather and no scatter to overlap with: each product is followed by one sum over ranks",
            key=f"{key}.async",
            fix=f"set {key}.sequence_parallel=true, or remove async",
        )


def _styles(options: Any, key: str) -> Iterator[Problem]:
    from camshaft_tensor_parallel.styles import Style

    for glob, text in options.plan.items():
        try:
            Style.of(text, f"{key}.plan.{glob}")
        except RecipeError as error:
            yield from error.problems


def _heads(context: PlanContext, degree: int) -> Iterator[Problem]:
    from camshaft.models.config import resolve

    try:
        config = resolve(context.recipe.model, context.recipe.model.vocab_size or 1)
    except RecipeError:
        return  # told by who checks the model
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    if heads % degree:
        yield Problem(
            f"{heads} attention heads cannot be divided over {degree} ranks",
            key=KEY,
            fix=f"set it to a divisor of {heads}: {_divisors(heads)}, or change model.num_attention_heads",
        )
    elif keys % degree and degree % keys:
        yield Problem(
            f"{keys} key/value heads can neither be divided over {degree} ranks nor shared by them evenly",
            key=KEY,
            fix=f"set it to a divisor or a multiple of {keys} that divides {heads}, or change "
            "model.num_key_value_heads",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
