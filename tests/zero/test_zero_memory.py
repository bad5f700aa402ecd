"""Model state of each rank, counted from live tensors, against the formulas of Rajbhandari et al. and the plan."""

import gc
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zero_cases import plugins, sections

from camshaft import comm
from camshaft.cli import estimate
from camshaft.distributed import Environment
from camshaft.estimate import PASSING
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


def settled():
    """``live`` once messages are let go of: a thread of gloo's holds the last one for a moment longer than ``wait``."""
    found = []
    for _ in range(5):
        gc.collect()
        found.append(live())
        time.sleep(0.01)
    return min(found)


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Counts(Plugin):
    """Counts in the second step: before and after each forward, when gradients are final, and the most at any
    collective.
    """

    def __init__(self):
        super().__init__()
        self.peak, self.full, self.found, self.forwards = 0, 0, {}, []
        self.native = None

    @hookimpl
    def bind(self):
        comm.Channel.observer = self.note

    def note(self, call):
        if self.counting:
            self.peak, self.full = max(self.peak, live()), max(self.full, own(self.native)["full"])

    @hookimpl
    def pre_forward(self, state):
        self.counting = state.step == 1
        if self.counting:
            self.forwards.append({"live": settled(), **own(self.native)})

    def before_backward(self):
        if self.counting:
            self.forwards[-1] |= {f"{kind} at its end": size for kind, size in own(self.native).items()}

    @hookimpl
    def post_reduce(self, state):
        if state.step == 1:
            self.found["live"] = settled()
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
        seen = counts.native = trainer.host.plugins["zero"]._storage
        before(trainer.stepper, "_step", lambda: counts.found.update(own(seen)))
        before(trainer.stepper.strokes, "begin_backward", counts.before_backward)
        trainer.train(Quiet(), Quiet())
    seen = {"peak": counts.peak, "full at most": counts.full, "largest": largest.bytes, "forwards": counts.forwards}
    return counts.found | seen


def within(mode, call):
    def run(*arguments):
        with mode:
            return call(*arguments)

    return run


def before(owner, name, look):
    """Call ``look`` before each call of a method: after all of ``post_reduce``, after all of ``around_forward``."""
    call = getattr(owner, name)

    def run(*arguments):
        look()
        call(*arguments)

    setattr(owner, name, run)


def own(native):
    """What the plugin says that it holds."""
    reducer, fillings = native._reducer, native._reducer._fillings
    buffers = [room.flat for room in reducer._pool._rooms]
    buffers += [each.buffer for each in fillings if each.buffer is not None and each.room is None]
    scratch = [line._scratch for line in (native.grid.inner, native.grid.outer, native.grid.everyone) if line]
    return {
        "parameters": bytes_of([unit.shard if unit.full is None else unit.full for unit in native.units]),
        "totals": bytes_of([each.total for each in fillings if each.total is not None]),
        "full": sum(each.untyped_storage().nbytes() for each in buffers),
        "sums": bytes_of([chunk for _, pending, chunk, _ in reducer._started if pending is not None]),
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
    whole = "1" in row  # full gradients are there until the last microbatch's are summed
    resolved = recipe(make_recipe, row, ranks, 2 if whole else 1, compute, MODEL, **options)
    elements, expected = planned(resolved, ranks)
    wanted = paper(row, ranks, elements, compute == NARROW)
    state = expected.state
    assert [state.parameters, state.gradients, state.masters + state.moments] == pytest.approx(wanted, rel=0.02)
    for found in run_ranks(ranks, counted, resolved, timeout_s=120):
        moment = found["forwards"][-1] if whole else found
        kinds = [moment["parameters"], moment["full"] or moment["totals"], moment["masters"] + found["moments"]]
        assert kinds == pytest.approx(wanted, rel=0.02), found
        # Gradients in the masters' dtype exist from the reduction to the release only.
        widened = found["widened"] if compute == NARROW and not whole else 0
        assert sum(wanted) * 0.98 <= moment["live"] <= 1.02 * sum(wanted) + widened + standing(expected) + 65536
        assert found["totals"] == pytest.approx(wanted[1] / (ranks if whole else 1), rel=0.02)
        assert found["full"] == (found["totals"] if row == "replicate" else 0), "freed as soon as summed"


def standing(expected):
    """Stated buffers that are there all the time."""
    return sum(size for what, size in expected.buffers if not what.endswith(PASSING))


@pytest.mark.parametrize("row", ["replicate", "1", "2", "2 last", "3"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_no_memory_of_gradients_is_beside_the_activations_of_a_forward(make_recipe, row, ranks):
    """Nor what they are received into, but for what earlier microbatches left to add to."""
    options = {} if row == "3" else {"bucket_size_mb": 0.5}
    resolved = recipe(make_recipe, row, ranks, 2, "fp32", MODEL, **options)
    elements, expected = planned(resolved, ranks)
    state = expected.state
    each = row in ("2", "3")
    for found in run_ranks(ranks, counted, resolved, timeout_s=120):
        first, second = found["forwards"]
        for when in ("", " at its end"):
            assert [first[kind + when] for kind in ("totals", "full", "sums", "scratch")] == [0, 0, 0, 0], when
        assert first["live"] <= 1.02 * (state.total - state.gradients) + standing(expected) + 65536
        ends = [second[f"{kind} at its end"] for kind in ("full", "sums", "scratch")]
        assert ends == pytest.approx([0 if each else 4 * elements, 0, 0], rel=0.02)
        assert second["totals at its end"] == pytest.approx(4 * elements / ranks if each else 0, rel=0.02)


class Keeper(Plugin):
    """Keeps gradients longer than they are promised to be there."""

    def __init__(self):
        super().__init__()
        self.shown, self.summed = [], []

    @hookimpl
    def post_backward(self, state):
        if not state.final_backward:
            self.shown += [each.grad for each in state.model.parameters() if each.grad is not None]

    @hookimpl
    def around_step(self, state, call):
        def step():
            gradients = [each.grad for each in state.world.parts.tensors if each.grad is not None]
            self.summed += [(each, each.clone()) for each in gradients]
            call()

        return step


def keep_all(rank, world_size, resolved):
    keeper, directory = Keeper(), RunDirectory(resolved.recipe.run.dir)
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    with session(resolved, environment, directory, {"keeper": keeper}) as trainer:
        trainer.train(Quiet(), Quiet())
        assert keeper.summed and all(torch.equal(kept, values) for kept, values in keeper.summed)
        assert all(bool(torch.isfinite(each).all()) for each in keeper.shown)
    return len(keeper.shown)


@pytest.mark.parametrize(("row", "ranks"), [("replicate", 2), ("1", 2), ("1", 1), ("2", 2), ("2 last", 2), ("3", 2)])
def test_a_gradient_that_somebody_keeps_can_be_read_when_its_step_is_over(make_recipe, row, ranks):
    """It could not if it were a view of what units use in turn, which has no memory between backwards."""
    options = {} if row == "3" else {"bucket_size_mb": 0.5}
    resolved = recipe(make_recipe, row, ranks, 2, "fp32", MODEL, **options)
    shows = row not in ("2", "3")  # these sum them at once
    assert all(bool(shown) == shows for shown in run_ranks(ranks, keep_all, resolved, timeout_s=120))


@pytest.mark.parametrize(("row", "parts"), [("1", 3), ("2", 2)])
def test_few_units_have_full_gradients_at_once(make_recipe, row, parts):
    """As many as the plan says, though every unit is summed in this microbatch."""
    resolved = recipe(make_recipe, row, 2, 1, "fp32", MODEL, bucket_size_mb=0.5)
    elements, expected = planned(resolved, 2)
    passing = sum(size for what, size in expected.buffers if what.endswith(PASSING))
    assert passing <= parts * 0.5 * 2**20 < 4 * elements / 2
    for found in run_ranks(2, counted, resolved, timeout_s=120):
        assert passing / parts < found["full at most"] <= passing


@pytest.mark.parametrize(
    ("row", "ranks", "model", "compute"),
    [("3", 2, MODEL, NARROW), ("3", 4, WIDE, "fp32"), ("2", 2, MODEL, NARROW), ("1", 2, MODEL, "fp32")],
)
def test_the_peak_of_a_step_stays_under_what_is_stated(make_recipe, row, ranks, model, compute):
    """State, the stated buffers, and what backward has made of one unit; on a CPU also what is received into."""
    options = {} if row == "3" else {"bucket_size_mb": 0.5}
    resolved = recipe(make_recipe, row, ranks, 3 if ranks == 2 and row != "1" else 1, compute, model, **options)
    _, expected = planned(resolved, ranks)
    buffers = dict(expected.buffers)
    one_unit = buffers["full gradients of units on their way"] / 2
    for found in run_ranks(ranks, counted, resolved, timeout_s=120):
        wide = 2 if compute == NARROW else 1
        receiving = 2 * wide * one_unit * (ranks - 1) / ranks
        bound = expected.state.total + sum(buffers.values()) + one_unit + receiving + found["widened"]
        assert found["peak"] <= bound * 1.02 + 65536, found
        assert found["peak"] >= expected.state.total - (expected.state.gradients if row == "1" else 0)


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
