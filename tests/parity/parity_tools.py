"""Run a recipe on forked ranks with a probe, and compare with the plain reference."""

import math

import torch

from camshaft.claims import Plan
from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks
from camshaft.testing.record import Probe, distance


class Quiet:
    """Stands for the heartbeat and the stop signal of a launched run."""

    requested = 0

    def beat(self, step, phase):
        pass


class Variant(Plugin):
    """Owns ``build_model``: freezes, and adds a parameter that nothing uses."""

    def __init__(self, frozen=(), unused=False):
        super().__init__()
        self.frozen, self.unused = frozen, unused

    @hookimpl
    def plan(self):
        return Plan()

    @hookimpl
    def build_model(self, config):
        from camshaft.models.llama import Llama

        model = Llama(config)
        change(model, self.frozen, self.unused)
        return model


def change(model, frozen, unused):
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    if unused:
        model.unused = torch.nn.Parameter(torch.empty(7, 3, device="meta"))


def on_rank(rank, world_size, resolved, observers):
    probe = Probe()
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    directory = RunDirectory(resolved.recipe.run.dir)
    with session(resolved, environment, directory, {**observers, "probe": probe}) as trainer:
        trainer.train(Quiet(), Quiet())
    return probe.records


def train(resolved, world_size, observers=None):
    """Records of every rank."""
    return run_ranks(world_size, on_rank, resolved, observers or {}, timeout_s=120)


def compare(records, reference):
    """Worst relative deviation of each quantity over all steps, and where: {quantity: (deviation, place)}."""
    assert [record.step for record in records] == [record.step for record in reference]
    worst = dict.fromkeys(("gradients", "norm", "weights", "optimizer", "loss", "lr"), (0.0, "-"))

    def note(quantity, deviation, place):
        if not deviation <= worst[quantity][0]:  # NaN must not pass
            worst[quantity] = (deviation if not math.isnan(deviation) else math.inf, place)

    for got, wanted in zip(records, reference, strict=True):
        for quantity in ("gradients", "weights", "optimizer"):
            one, other = getattr(got, quantity), getattr(wanted, quantity)
            assert one.keys() == other.keys(), (quantity, got.step, one.keys() ^ other.keys())
            for name in one:
                place = f"step {got.step} {name}"
                if one[name] is None or other[name] is None:
                    assert one[name] is other[name], f"{place}: a gradient on one side only"
                    continue
                note(quantity, distance(one[name], other[name]), place)
        for quantity in ("norm", "loss", "lr"):
            one, other = getattr(got, quantity), getattr(wanted, quantity)
            assert (one is None) == (other is None)
            if one is not None:
                note(quantity, abs(one - other) / abs(other), f"step {got.step}")
    return worst


def assert_within(worst, bounds):
    over = {key: worst[key] for key, bound in bounds.items() if not worst[key][0] <= bound}
    assert not over, f"over the bound: {over}; bounds {bounds}"


def assert_bit_equal(one, other):
    for got, wanted in zip(one, other, strict=True):
        for quantity in ("gradients", "weights", "optimizer"):
            left, right = getattr(got, quantity), getattr(wanted, quantity)
            assert left.keys() == right.keys()
            for name in left:
                same = left[name] is right[name] if left[name] is None else torch.equal(left[name], right[name])
                assert same, f"step {got.step} {quantity} {name}"
        assert (got.norm, got.loss, got.lr) == (wanted.norm, wanted.loss, wanted.lr)
