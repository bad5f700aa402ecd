"""Narrow gradients are added up, kept and sent in fp32 where the recipe says so, in the core and in ``ddp``."""

import pytest
import torch
from precision_cases import plugins

from camshaft.comm import Channel
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.run import record_ranks

NARROW = {"parameters": "bf16"}
FIVE = {"max_steps": 5, "log_every": 5}
"""The warm-up of the shared recipe does not end earlier."""
WIDE = {**NARROW, "gradients": "fp32"}


def gradients(make_recipe, ranks, accumulation, precision):
    """Of the first step."""
    resolved = make_recipe(plugins(**precision), ranks, accumulation=accumulation, training=FIVE)
    return record_ranks(resolved, ranks)[0][0].gradients


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_in_fp32_are_added_up_in_fp32(ranks, make_recipe):
    """Over 6 microbatches: nearer to one backward of the whole window than sums that are rounded after each."""
    exact = gradients(make_recipe, 1, 1, WIDE)

    def error(precision):
        found = gradients(make_recipe, ranks, 6, precision)
        return sum(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)

    assert error(WIDE) < 0.8 * error(NARROW)


class Wire(Plugin):
    """Fails on a sum of gradients on the wire, a loss or a norm in another dtype than ``wire`` and fp32."""

    def __init__(self, wire):
        super().__init__()
        self._wire = wire

    @hookimpl
    def bind(self):
        self.seen = set()
        Channel.observer = lambda call: self.seen.add((call.plugin, call.op, call.dtype))

    @hookimpl
    def post_step(self, state):
        Channel.observer = None
        sums = {dtype for plugin, op, dtype in self.seen if plugin in ("ddp", "zero") and op.startswith("reduce")}
        sums |= {dtype for plugin, op, dtype in self.seen if plugin == "ddp" and op == "all_reduce"}
        assert sums == {self._wire}, self.seen
        assert state.grad_norm.dtype == state.loss.dtype == torch.float32


@pytest.mark.parametrize("owner", ["ddp", "zero"])
@pytest.mark.parametrize(("option", "wire"), [({}, torch.float32), ({"reduce": "bf16"}, torch.bfloat16)])
def test_sums_over_ranks_travel_in_fp32_unless_the_recipe_says_otherwise(owner, option, wire, make_recipe):
    chosen = {} if owner == "ddp" else {"ddp": None, "zero": {"stage": 2}}
    resolved = make_recipe(plugins(**NARROW, **option) | chosen, 2, training=FIVE)
    record_ranks(resolved, 2, {"wire": Wire(wire)})
