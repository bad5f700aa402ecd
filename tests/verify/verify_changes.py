"""Wrong functions in the place of right ones: what each fault of the catalogue does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

Change = Callable[[Any], Any]
"""From the right function to a wrong one."""


def after(act) -> Change:
    """The function, then ``act(result, *arguments)``, whose result counts unless it is None."""

    def change(right):
        def wrong(*arguments, **named):
            result = right(*arguments, **named)
            found = act(result, *arguments)
            return result if found is None else found

        return wrong

    return change


def before(act) -> Change:
    """``act(*arguments)``, then the function."""

    def change(right):
        def wrong(*arguments, **named):
            act(*arguments)
            return right(*arguments, **named)

        return wrong

    return change


def instead(act) -> Change:
    return lambda right: act


def times(factor) -> Change:
    """The result, a tensor or a tuple of which the first is one, times ``factor``."""

    def act(result, *_):
        if isinstance(result, tuple):
            return (None if result[0] is None else result[0] * factor, *result[1:])
        return None if result is None else result * factor

    return after(act)


def skip(*_arguments, **_named):
    return None


def no_sum(bucket, channel, dtype):
    """A bucket that stays at home."""
    from camshaft.comm import Pending

    bucket.flags.fill_(1)
    bucket._pending = Pending(())


def scale_bucket(factor, which=slice(None)):
    return after(lambda _, bucket: [view.mul_(factor) for view in bucket.views[which]] and None)


def only_last(_, reducer):
    """Gradients of earlier microbatches are forgotten."""
    if not reducer._state.final_backward:
        for bucket in reducer.buckets:
            bucket.flat.zero_()


def forget_total(reducer):
    if reducer._started:
        reducer._started[0][0].total = None


def no_scatter(reducer, filling):
    """The stretch of this rank's own gradients alone."""
    source = filling.source() if filling.buffer is not None else None
    if source is None:
        reducer._take(filling)
        source = filling.source()
    begin, end = reducer._grid.stretch(filling.unit.layout.size)
    reducer._started.append((filling, None, source[begin:end].clone(), None))


def no_last_bucket(right):
    def start(publisher):
        units, publisher._units = publisher._units, publisher._units[:-1]
        right(publisher)
        publisher._units = units

    return start


def other_values(right):
    return lambda model, units, seed, boxes: right(model, units, seed + 1, boxes)


def told_copies(count) -> Change:
    """Boxes as they are, and another number of ranks that have each of them."""
    return after(lambda found, *_: (replace(found[0], copies=count), found[1]))


def off_by_one(right):
    def places(own, tokens):
        found, away = right(own, tokens)
        return (found - 1).clamp_(min=0), away

    return places


def own_tokens(ctx, gradient):
    """What a rank got back is its own part alone, not the sum."""
    line = ctx.line
    flat = gradient.reshape(-1, gradient.shape[-1])
    missing = line.size * line.share - len(flat)
    flat = torch.cat((flat, flat.new_zeros(missing, flat.shape[1]))) if missing else flat
    return flat[line.rank * line.share : (line.rank + 1) * line.share].unsqueeze(0).clone(), None


def half_back(right):
    def hand_back(executor, action, hidden, gradient):
        right(executor, action, hidden, None if gradient is None else gradient * 0.5)

    return hand_back


def mean_of_means(right):
    def begin(executor, action):
        live, gradient = right(executor, action)
        return live, gradient if live.loss is None else gradient / 4

    return begin


def without_others(right):
    def weights(deferral, place):
        deferral._kept[place].others.clear()
        right(deferral, place)

    return weights


def half_sent(right):
    def share(owner):
        world, readable = owner._state.world, owner._state.world.readable
        parameter = owner.parameter
        kept = parameter.data
        parameter.data = kept * 0.5
        world.readable = False
        right(owner)
        world.readable, parameter.data = readable, kept

    return share


def every_copy(right):
    def by_copies(clipper):
        return {1: [gradient for members in right(clipper).values() for gradient in members]}

    return by_copies


def here_alone(clipper):
    return clipper._norm_here([tensor.grad for tensor in clipper.parts.tensors if tensor.grad is not None])


def dtype(**fields) -> Change:
    return after(lambda policy, *_: replace(policy, **fields))


def group(**values) -> Change:
    """The optimizer that was made, with other values in every group."""

    def act(optimizer, *_):
        for each in optimizer.param_groups:
            each.update({key: value(each[key]) if callable(value) else value for key, value in values.items()})

    return after(act)


def shaken(made, _slot):
    """What is made again in backward is not what forward had."""
    return made * 1.01 if made.is_floating_point() else made


def narrow_loss(right):
    def around(plugin, state, call):
        inner = right(plugin, state, call)

        def forward(batch):
            made = inner(batch)
            return made.float().to(made.dtype)

        return forward

    return around


def opposite(right):
    def directions(optimizer, tensors, group):
        return [-each for each in right(optimizer, tensors, group)]

    return directions
