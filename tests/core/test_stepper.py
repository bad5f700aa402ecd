"""The stepper on layouts that no shipped plugin has yet, and what a step leaves behind."""

import gc
import time
from types import SimpleNamespace

import pytest
import torch

from camshaft.distributed import Environment
from camshaft.host import Host
from camshaft.loop import session
from camshaft.masters import whole_parts
from camshaft.mesh import MeshShape
from camshaft.plugin import Plugin, hookimpl
from camshaft.program import Action, Kind, accumulate
from camshaft.recipe.schema import Parallel
from camshaft.rundir import RunDirectory
from camshaft.seeds import seed_step
from camshaft.state import BatchPlan
from camshaft.step import Stepper
from camshaft.testing.run import Quiet


class Control:
    """Answers what the side channel would: the sum over all ranks."""

    def __init__(self, *sums):
        self.sums, self.started = list(sums), []

    def start(self, values):
        self.started.append(tuple(values))

    def finish(self):
        return self.sums


class Doubles(torch.nn.Module):
    """Its loss is the batch times its weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, batch):
        return self.weight * batch.value


def stub(parallel, world_size, *, rank=0, sums=(12, 0), values=(1.0, 3.0), step=0, seed=5):
    """A state with one weight and ``values`` as microbatches."""
    model = Doubles()
    shape = MeshShape.of(parallel, world_size)
    world = SimpleNamespace(
        recipe=SimpleNamespace(seed=seed, batch=SimpleNamespace(on_out_of_memory="stop")),
        draws=True,
        mesh=SimpleNamespace(shape=shape),
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        batch=BatchPlan(1, len(values), len(values)),
        parts=whole_parts(model, {"weight": "matrix"}),
        stages={},
    )
    batches = [SimpleNamespace(value=value) for value in values]
    return SimpleNamespace(
        world=world,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        control=Control(*sums),
        window=SimpleNamespace(batches=batches, weight=6, samples=1, tokens=32),  # a short last one
        step=step,
        loss=None,
        lr=0.0,
        microbatch=0,
        final_backward=False,
        grad_norm=None,
        masters=None,
        loss_scale=None,
        skipped=False,
        consumed_samples=0,
        consumed_tokens=0,
    )


@pytest.mark.parametrize(
    ("parallel", "world_size", "weight"),
    [(Parallel(), 2, 12), (Parallel(tensor_parallel=2), 4, 6), (Parallel(context_parallel=3), 3, 4)],
)
def test_ranks_that_share_samples_count_their_weight_once(parallel, world_size, weight):
    state = stub(parallel, world_size)
    stepper = Stepper(Host({}), state, accumulate(2))
    stepper.run(stop_requested=False)
    assert state.control.started == [(6, 0)]
    assert stepper.strokes.total_weight == weight
    # Two microbatches of 1 and 3: the gradient is their sum over the weight, the rate 0.5.
    assert float(state.model.weight.detach()) == pytest.approx(2.0 - 0.5 * 4.0 / weight, rel=1e-15)
    assert float(state.loss) == 8.0 and (state.step, state.consumed_samples, state.consumed_tokens) == (1, 1, 32)


def test_each_window_is_divided_by_its_own_weight_and_starts_its_loss_anew():
    state = stub(Parallel(), 1, sums=(4, 0))
    stepper = Stepper(Host({}), state, accumulate(2))
    stepper.run(stop_requested=False)
    before = float(state.model.weight.detach())
    state.control.sums = [8, 1]
    stepper.run(stop_requested=True)
    assert stepper.stop_votes == 1 and state.control.started[-1] == (6, 1)
    assert float(state.loss) == pytest.approx(4.0 * before)
    assert float(state.model.weight.detach()) == pytest.approx(before - 0.5 * 4.0 / 8)


def test_a_window_without_any_label_moves_nothing():
    state = stub(Parallel(), 1, sums=(0, 0), values=(0.0, 0.0))
    Stepper(Host({}), state, accumulate(2)).run(stop_requested=False)
    assert float(state.model.weight.detach()) == 2.0 and state.step == 1


def test_the_last_backward_of_the_program_is_the_final_one_whatever_its_number():
    seen = []

    class Watches(Plugin):
        @hookimpl
        def post_backward(self, state):
            seen.append((state.microbatch, state.final_backward))

        @hookimpl
        def handlers(self, state):
            return {Kind.SEND_F: lambda action: seen.append(("send", action.microbatch))}

    order = ((Kind.F, 0), (Kind.F, 1), (Kind.B, 1), (Kind.SEND_F, 1), (Kind.B, 0), (Kind.REDUCE, -1))
    program = (*(Action(*pair) for pair in order), Action(Kind.CLIP), Action(Kind.STEP))
    Stepper(Host({"watches": Watches()}), stub(Parallel(), 1), program).run(stop_requested=False)
    assert seen == [(1, False), ("send", 1), (0, True)]


def draw(**changes):
    parallel = Parallel(tensor_parallel=2)
    state = stub(parallel, 4, **changes)
    seed_step(state)
    return float(torch.rand(()))


def test_random_numbers_follow_seed_step_and_part_of_the_batch():
    assert draw(rank=0) == draw(rank=1), "ranks of one tensor-parallel group drop the same units"
    assert len({draw(), draw(rank=2), draw(step=1), draw(seed=6)}) == 4


class FactorByStep(Plugin):
    @hookimpl
    def lr(self, step):
        return 1.0 / (step + 1)


def test_the_rate_is_the_first_one_times_the_factor_of_this_step():
    state = stub(Parallel(), 1)
    stepper = Stepper(Host({"factor": FactorByStep()}), state, accumulate(2))
    rates = []
    for _ in range(3):
        stepper.run(stop_requested=False)
        rates.append((state.lr, state.optimizer.param_groups[0]["lr"]))
    assert rates == [(rate, rate) for rate in (0.5, 0.25, 0.5 / 3)]


def live_tensors():
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]


def test_a_step_leaves_no_graph_and_no_tensor_behind(make_recipe):
    settings = {"adamw": {"lr": 1e-3}, "clip": {"max_norm": 1.0}, "precision": {"compute": "bf16"}}
    resolved = make_recipe(settings, training={"max_steps": 9, "log_every": 2})
    counts, graphs = [], []

    class Counts(Plugin):
        @hookimpl
        def post_step(self, state):
            alive = live_tensors()
            counts.append(len(alive))
            graphs.append(sum(thing.grad_fn is not None for thing in alive))

    with session(resolved, Environment(), RunDirectory(resolved.recipe.run.dir), {"counts": Counts()}) as trainer:
        trainer.state.loader.next = FewerAhead(trainer.state.loader)
        before = sum(thing.grad_fn is not None for thing in live_tensors())
        trainer.train(Quiet(), Quiet())
    assert set(graphs) == {before}
    assert len(counts) == 9 and len(set(counts[2:])) == 1, counts


class FewerAhead:
    """Waits until the loader's thread has filled its queue, so that its tensors do not come and go."""

    def __init__(self, loader):
        self.loader, self.next = loader, loader.next

    def __call__(self):
        window = self.next()
        queue = self.loader._ahead._queue
        while not queue.full():
            time.sleep(0.001)
        return window
