"""Model state of each rank, counted from live tensors, against the formulas of Rajbhandari et al. and the plan."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zero_cases import plugins, sections

from camshaft import comm
from camshaft.cli import estimate
from camshaft.distributed import Environment
from camshaft.host import Host
from camshaft.loop import session
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet
from camshaft_zero.native import Native

MODEL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32, "num_hidden_layers": 8}
WIDE = {**MODEL, "vocab_size": 4000, "num_hidden_layers": 2}
"""Its embedding is larger than everything else."""
NARROW = {"compute": "bf16", "parameters": "bf16"}


def live():
    """Bytes of all tensors that Python can see, each storage once; not of those before ``gc.freeze()``."""
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            found[each.untyped_storage()._cdata] = each.untyped_storage().nbytes()
            if each.is_leaf and each.grad is not None:
                found[each.grad.untyped_storage()._cdata] = each.grad.untyped_storage().nbytes()
    return sum(found.values())


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Counts(Plugin):
    """Counts when gradients are final, before the second step, and the most at any collective of that step."""

    def __init__(self):
        super().__init__()
        self.peak, self.found = 0, {}

    @hookimpl
    def bind(self):
        comm.Channel.observer = self.note

    def note(self, call):
        if self.counting:
            self.peak = max(self.peak, live())

    @hookimpl
    def pre_forward(self, state):
        self.counting = state.step == 1

    @hookimpl
    def post_reduce(self, state):
        if state.step == 1:
            gc.collect()
            self.found["live"] = live()
            self.found["widened"] = bytes_of([p.tensor.grad for p in state.world.parts if p.tensor.grad is not None])
            held = [value for entry in state.optimizer.state.values() for value in entry.values()]
            self.found["moments"] = bytes_of([value for value in held if value.numel() > 1])

    @hookimpl
    def post_step(self):
        self.counting = False


class Largest(TorchDispatchMode):
    """The largest storage that any operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, list | tuple) else (result,):
            if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return result


def counted(rank, world_size, resolved):
    """Bytes by kind that a rank holds, from the plugin's own objects and from live tensors."""
    gc.freeze()
    counts, largest = Counts(), Largest()
    build, materialize = Native.__init__, Native.materialize
    Native.__init__ = within(largest, build)
    Native.materialize = within(largest, materialize)
    environment = Environment(rank, rank, world_size, world_size, "torchrun")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), {"counts": counts}) as trainer:
        seen = trainer.host.plugins["zero"]._storage
        before_step(trainer, lambda: counts.found.update(own(seen)))
        trainer.train(Quiet(), Quiet())
    return counts.found | {"peak": counts.peak, "largest": largest.bytes}


def within(mode, call):
    def run(*arguments):
        with mode:
            return call(*arguments)

    return run


def before_step(trainer, look):
    """Call ``look`` after all of ``post_reduce``."""
    step = trainer.stepper._step

    def run():
        look()
        step()

    trainer.stepper._step = run


def own(native):
    """What the plugin says that it holds."""
    fillings = native._reducer._fillings
    scratch = [line._scratch for line in (native.grid.inner, native.grid.outer, native.grid.everyone) if line]
    return {
        "parameters": bytes_of([unit.shard if unit.full is None else unit.full for unit in native.units]),
        "gradients": bytes_of([each.total if each.buffer is None else each.buffer for each in fillings]),
        "masters": bytes_of([unit.master for unit in native.units if unit.narrow]),
        "scratch": sum(each.free_bytes for each in scratch),
    }


def recipe(make_recipe, row, ranks, accumulation, compute, model, **options):
    changed = sections(row, ranks, accumulation)
    # One sample at a time: activations are then small beside the model.
    changed["batch"] = {"micro_batch_size": 1, "global_batch_size": ranks * accumulation}
    changed["model"] = make_recipe({}).tree["model"] | model
    changed["training"] = {"max_steps": 3, "log_every": 1000}
    return make_recipe({**plugins(row, compute=compute, **options), "lr_schedule": None}, ranks, **changed)


def planned(resolved, world_size):
    checked, host = check(resolved, world_size).require(), Host.of(resolved.recipe.plugins)
    return estimate.sizes(checked, host).elements, estimate.estimate(checked, host)


def paper(row, ranks, elements, narrow):
    """Rajbhandari et al., section 5, with Adam: (parameters, gradients, masters and moments) of a rank."""
    param, values = (2, 12) if narrow else (4, 8)
    divided = {"1": (1, 1, ranks), "2": (1, ranks, ranks), "2 last": (1, 1, ranks), "3": (ranks, ranks, ranks)}
    divided |= {"replicate": (1, 1, 1), "hybrid 3": (ranks // 2,) * 3, "hybrid 1, optimizer along both": (1, 1, ranks)}
    by = divided[row]
    return param * elements / by[0], param * elements / by[1], values * elements / by[2]


@pytest.mark.parametrize(
    ("row", "ranks", "compute"),
    [
        *(("replicate", 2, NARROW), ("1", 2, NARROW), ("1", 4, NARROW), ("2", 2, NARROW), ("2", 4, NARROW)),
        *(("3", 2, NARROW), ("3", 4, NARROW), ("1", 2, "fp32"), ("2", 2, "fp32"), ("3", 2, "fp32")),
        ("hybrid 1, optimizer along both", 4, NARROW),
    ],
)
def test_state_is_the_papers(make_recipe, row, ranks, compute):
    options = {} if "3" in row else {"bucket_size_mb": 0.5}
    resolved = recipe(make_recipe, row, ranks, 1, compute, MODEL, **options)
    elements, expected = planned(resolved, ranks)
    wanted = paper(row, ranks, elements, compute == NARROW)
    state = expected.state
    assert [state.parameters, state.gradients, state.masters + state.moments] == pytest.approx(wanted, rel=0.02)
    for found in run_ranks(ranks, counted, resolved, timeout_s=120):
        kinds = [found["parameters"], found["gradients"], found["masters"] + found["moments"]]
        assert kinds == pytest.approx(wanted, rel=0.02), found
        # Gradients in the masters' dtype exist from the reduction to the release only.
        widened = found["widened"] if compute == NARROW else 0
        buffers = sum(size for _, size in expected.buffers)
        assert sum(wanted) * 0.98 <= found["live"] <= 1.02 * sum(wanted) + widened + buffers + found["scratch"] + 65536


@pytest.mark.parametrize(
    ("row", "ranks", "model", "compute"), [("3", 2, MODEL, NARROW), ("3", 4, WIDE, "fp32"), ("2", 2, MODEL, NARROW)]
)
def test_the_peak_of_a_step_stays_under_what_is_stated(make_recipe, row, ranks, model, compute):
    """State, the stated buffers, and what backward has made of one unit; on a CPU also what is received into."""
    options = {} if row == "3" else {"bucket_size_mb": 0.5}
    resolved = recipe(make_recipe, row, ranks, 3 if ranks == 2 else 1, compute, model, **options)
    _, expected = planned(resolved, ranks)
    buffers = dict(expected.buffers)
    one_unit = buffers["full gradients of units on their way"] / 2
    for found in run_ranks(ranks, counted, resolved, timeout_s=120):
        wide = 2 if compute == NARROW else 1
        receiving = 2 * wide * one_unit * (ranks - 1) / ranks
        bound = expected.state.total + sum(buffers.values()) + one_unit + receiving + found["widened"]
        assert found["peak"] <= bound * 1.02 + 65536, found
        assert found["peak"] >= expected.state.total


@pytest.mark.parametrize(("model", "ranks"), [(MODEL, 2), (WIDE, 2)])
def test_no_rank_makes_anything_larger_than_its_shard_while_building(make_recipe, model, ranks):
    resolved = recipe(make_recipe, "3", ranks, 1, NARROW, model)
    elements, _ = planned(resolved, ranks)
    shapes = estimate.sizes(check(resolved, ranks).require(), Host.of(resolved.recipe.plugins)).parameters
    vocabulary = max(each.elements for each in shapes)
    for found in run_ranks(ranks, counted, resolved, timeout_s=120):
        shard = max(vocabulary, elements / model["num_hidden_layers"]) / ranks
        assert 0 < found["largest"] <= max(4 * shard * 1.1, 4 * 16384), (found["largest"], 4 * shard)
        assert found["largest"] < 4 * elements / ranks
