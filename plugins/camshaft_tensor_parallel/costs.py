"""What a rank sends along ``tp`` in a step, from the styles of the modules that it has. No torch.

T tokens of a microbatch, N ranks, widths c (of products) and p (of parameters): each region and each row product
changes between h values a token on every rank and sums over ranks, once in forward and once in backward. Without
sequence parallel that is one all-reduce for each, 2 (N-1)/N T h c bytes; with it a gather and a scatter, each of
(N-1)/N T h c bytes: the same. A layer has two of both: four all-reduces a microbatch. With ``async`` a region's gathers
and scatters go as messages (``all_to_all``) of the same bytes; they are counted as what they stand for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from camshaft.estimate import Estimate, Sent
from camshaft.recipe.checks import micro_batch_size
from camshaft_tensor_parallel.shapes import style_plan

if TYPE_CHECKING:
    from camshaft.claims import PlanContext
    from camshaft.estimate import Sizes
    from camshaft.models.shapes import ParameterShape
    from camshaft_tensor_parallel import Options
    from camshaft_tensor_parallel.styles import StylePlan

Bytes = Counter[str]
"""Operation to what one microbatch makes of it, before the share that a rank sends: elements times width."""

SHARE = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""Times (N-1)/N of the whole tensor."""

THERE_AND_BACK = {"enter": ("all_gather", "reduce_scatter"), "leave": ("reduce_scatter", "all_gather")}
"""Operations of forward and backward, into and out of a region, where tokens are divided."""

NUMBERS = 3
"""Numbers a token that ranks exchange for the cross-entropy: the largest logit, a sum, the label's logit."""


def estimate(options: Options, context: PlanContext, sizes: Sizes) -> Estimate:
    """Traffic of this rank; the model state is told by who owns storage, from the sizes of the boxes."""
    if sizes.config is None:
        return Estimate(notes=("what is sent along tp is not counted: a plugin builds a model of its own",))
    degree, plan = context.mesh["tp"].degree, style_plan(options, context)
    one = _microbatch(options, context, sizes, plan)
    total = Counter({op: count * sizes.accumulation for op, count in one.items()})
    part = (degree - 1) / degree
    sent = [Sent("tp", op, round(SHARE[op] * part * count)) for op, count in sorted(total.items()) if count]
    return Estimate(sent=(*sent, *_copies(options, sizes, plan)))


def _microbatch(options: Options, context: PlanContext, sizes: Sizes, plan: StylePlan) -> Bytes:
    assert sizes.config is not None
    tokens = micro_batch_size(context.recipe) * context.recipe.data.sequence_length
    degree, widths, found = context.mesh["tp"].degree, sizes.widths, Bytes()
    padded = -(-tokens // degree) * degree
    for passage, features, width in _passages(sizes, plan):
        if options.sequence_parallel:
            for op in THERE_AND_BACK[passage]:
                found[op] += padded * features * width
        else:  # the other direction needs no exchange
            found["all_reduce"] += tokens * features * width
    if any(_kind(plan, module) == "logits" for module in _modules(sizes)) and _kind(plan, "loss") == "loss":
        found["all_reduce"] += NUMBERS * tokens * max(widths.compute, 4)
    return found


def _kind(plan: StylePlan, module: str) -> str:
    style = plan.style(module)
    return "" if style is None else style.kind


def _passages(sizes: Sizes, plan: StylePlan) -> Iterator[tuple[str, int, int]]:
    """(into or out of a region, features, bytes of one) for each module of this rank that exchanges something."""
    assert sizes.config is not None
    hidden, widths = sizes.config.hidden_size, sizes.widths
    modules = _modules(sizes)
    for name in {".".join(module.split(".")[:end]) for module in modules for end in range(1, module.count(".") + 2)}:
        match _kind(plan, name):
            case "region" | "logits":
                yield "enter", hidden, widths.compute
            case "row":
                yield "leave", modules[name][0], widths.compute
            case "embedding":
                yield "leave", modules[name][-1], widths.param


def _modules(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Modules of this rank that use a matrix, and its whole shape."""
    found = {}
    for each in (*(sizes.parameters or ()), *sizes.borrowed):
        for name in (each.name, *each.tied):
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" or module not in found:
                found[module] = each.whole_shape
    return found


def _copies(options: Options, sizes: Sizes, plan: StylePlan) -> Iterator[Sent]:
    """Sums of the gradients of copies, once a step. Where storage is divided they go over its ranks too."""
    elements: Counter[int] = Counter()
    for each in sizes.parameters or ():
        if each.trains and each.copies > 1 and _is_partial(each, options, plan):
            elements[each.copies] += prod(each.shape)
    for copies, count in sorted(elements.items()):
        yield Sent("tp", "all_reduce", round(2 * (copies - 1) / copies * count * sizes.widths.master))


def _is_partial(each: ParameterShape, options: Options, plan: StylePlan) -> bool:
    return options.sequence_parallel or _kind(plan, each.name.rpartition(".")[0]) in ("inner", "shared")
