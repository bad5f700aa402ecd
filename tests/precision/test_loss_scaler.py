"""The scaler by itself: what it does to gradients and to the scale, and that all ranks of any mesh agree."""

from types import SimpleNamespace

import pytest
import torch
from precision_cases import plugins

from camshaft.build import SINGLE
from camshaft.distributed import Environment
from camshaft.errors import NonFiniteLoss
from camshaft.loop import session
from camshaft.masters import whole_parts
from camshaft.mesh import Mesh, MeshShape
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe.schema import Parallel
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet
from camshaft_precision.scaler import LARGEST, LossScaler, unscale_


def stub(mesh=None, sizes=((3, 2), (0,), (4,))):
    model = torch.nn.Module()
    for index, size in enumerate(sizes):
        model.register_parameter(f"p{index}", torch.nn.Parameter(torch.zeros(size)))
    mesh = Mesh(MeshShape.of(Parallel(), 1), 0, None) if mesh is None else mesh
    parts = whole_parts(model, {f"p{index}": "matrix" for index in range(len(sizes))})
    world = SimpleNamespace(device=torch.device("cpu"), mesh=mesh, parts=parts)
    return SimpleNamespace(world=world, model=model, loss_scale=None, skipped=False, step=7, extras={})


def scaler_of(state, initial=2.0**16, growth_interval=2000):
    return LossScaler(state, "precision", initial=initial, growth_interval=growth_interval)


def window(state, scaler, value):
    """One step with ``value`` in one gradient: whether the inner step ran."""
    ran = []
    state.skipped = False
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.model.p2.grad[1] = value
    scaler.unscale()
    scaler.step(lambda: ran.append(True))
    assert state.skipped == (not ran)
    return bool(ran)


def test_gradients_are_divided_exactly_and_in_place():
    state = stub()
    scaler = scaler_of(state)
    wanted = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in state.model.parameters()]
    for parameter, value in zip(state.model.parameters(), wanted, strict=True):
        parameter.grad = value * state.loss_scale
    held = [parameter.grad for parameter in state.model.parameters()]
    scaler.unscale()
    assert float(state.loss_scale) == 65536.0
    for parameter, before, value in zip(state.model.parameters(), held, wanted, strict=True):
        assert parameter.grad is before and torch.equal(parameter.grad, value)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_bad_value_skips_the_step_and_halves_the_scale(bad):
    state = stub()
    scaler = scaler_of(state)
    assert window(state, scaler, 1.0)
    assert not window(state, scaler, bad)
    assert window(state, scaler, 1.0), "it is asked anew in each step"
    assert float(state.loss_scale) == 32768.0
    assert state.extras == {"plugin/precision/loss_scale": 32768.0, "plugin/precision/skipped_steps": 1}


def test_each_dtype_is_unscaled_by_itself(monkeypatch):
    """A GPU's function reads every tensor that it gets in the dtype of the first."""
    function, lists = torch._amp_foreach_non_finite_check_and_unscale_, []

    def spy(gradients, found, inverse):
        lists.append({gradient.dtype for gradient in gradients})
        function(gradients, found, inverse)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", spy)
    narrow, wide = torch.full((3,), 8.0, dtype=torch.float16), torch.full((2,), 16.0)
    found, inverse = torch.zeros(()), torch.tensor(0.25)
    unscale_([narrow, wide, narrow.clone()], found, inverse)
    assert lists == [{torch.float16}, {torch.float32}]
    assert narrow.tolist() == [2.0] * 3 and wide.tolist() == [4.0] * 2 and not found
    wide[1] = float("inf")
    unscale_([wide, narrow], found, inverse)
    assert found == 1.0, "what comes later and is finite takes nothing back"


def test_parts_without_gradients_are_left_out():
    state = stub()
    scaler = scaler_of(state)
    ran = []
    scaler.unscale()
    scaler.step(lambda: ran.append(True))
    assert ran and all(parameter.grad is None for parameter in state.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_of_gradients(dtype):
    found, gradients = torch.zeros(()), [torch.full((5,), 8.0, dtype=dtype), torch.empty(0, dtype=dtype)]
    unscale_(gradients, found, torch.tensor(0.25))
    assert gradients[0].tolist() == [2.0] * 5 and float(found) == 0
    gradients[0][4] = float("inf")
    unscale_(gradients, found, torch.tensor(1.0))
    assert float(found) == 1
    unscale_([], found, torch.tensor(1.0))


def test_the_scale_goes_as_torchs_own_scaler_lets_it_go():
    """The same overflows given to torch.amp.GradScaler, which knows nothing of ranks: 300 steps, 40 overflows."""
    state = stub()
    scaler = scaler_of(state, growth_interval=5)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    torchs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=5)
    overflows = (torch.rand(300, generator=torch.Generator().manual_seed(2)) < 0.13).tolist()
    scales = set()
    for overflow in overflows:
        value = float("inf") if overflow else 1.0
        torchs.scale(parameter.sum()).backward()
        parameter.grad.fill_(value)
        torchs.step(optimizer)
        torchs.update()
        assert window(state, scaler, value) != overflow
        assert float(state.loss_scale) == torchs.get_scale()
        scales.add(torchs.get_scale())
    assert scaler.state_dict()["skipped_steps"] == sum(overflows) > 20 and len(scales) > 5


def test_at_the_smallest_scale_an_overflow_ends_the_run():
    state = stub()
    scaler = scaler_of(state, initial=2.0)
    assert not window(state, scaler, float("inf")) and float(state.loss_scale) == 1.0
    with pytest.raises(NonFiniteLoss, match="at step 8, with a loss scale of 1, the smallest: 1 step"):
        window(state, scaler, float("inf"))
    assert window(state, scaler, 1.0), "and not without one"


def test_the_scale_stays_below_what_fp32_can_hold():
    state = stub()
    scaler = scaler_of(state, initial=2.0**32, growth_interval=1)
    for _ in range(200):
        assert window(state, scaler, 0.0)
    assert float(state.loss_scale) == LARGEST


def test_what_was_saved_goes_on():
    one, other = stub(), stub()
    first, second = scaler_of(one, growth_interval=3), scaler_of(other, growth_interval=3)
    for value in (1.0, float("inf"), 1.0, 1.0):
        window(one, first, value)
    second.load_state_dict(first.state_dict())
    assert float(other.loss_scale) == float(one.loss_scale) == 32768.0
    for value in (1.0, 1.0, float("nan"), 1.0):
        assert window(one, first, value) == window(other, second, value)
        assert float(other.loss_scale) == float(one.loss_scale) and first.state_dict() == second.state_dict()


MESHES = {
    "data": Parallel(),
    "hybrid": Parallel(data_parallel_shard=2),
    "data-and-tensor": Parallel(tensor_parallel=2),
    "pipeline-and-tensor": Parallel(pipeline_parallel=2, tensor_parallel=2),
}


def agreeing(rank, world_size, parallel):
    mesh = Mesh.connect(MeshShape.of(parallel, world_size), rank, "cpu", 30)
    state = stub(mesh, sizes=((3, 2), (0,), (4,)) if rank != 2 else ((1,), (2,), (4,)))  # ranks hold other parts
    scaler = scaler_of(state)
    calls = []
    for channel in scaler._channels:
        assert channel.plugin == "precision"
        channel.all_reduce = counting(channel, calls)
    found = [window(state, scaler, float("nan") if rank == bad else 1.0) for bad in (None, 0, 1, 2, 3, None)]
    return found, float(state.loss_scale), calls


def counting(channel, calls):
    inner = channel.all_reduce

    def all_reduce(tensor, hook, op="sum"):
        calls.append((channel.axis, hook, op, tensor.nbytes))
        return inner(tensor, hook, op)

    return all_reduce


@pytest.mark.parametrize("name", MESHES)
def test_what_one_rank_finds_every_rank_knows(name):
    """Also ranks along axes on which gradients are not summed, and NaN, which a maximum of gradients might lose."""
    for found, scale, calls in run_ranks(4, agreeing, MESHES[name]):
        assert found == [True, False, False, False, False, True] and scale == 4096.0
        axes = {"data": 1, "hybrid": 1}.get(name, 2)
        assert len(calls) == 6 * axes and len({axis for axis, *_ in calls}) == axes
        assert {tuple(rest) for _, *rest in calls} == {("post_reduce", "max", 4)}


def test_other_plugins_see_gradients_without_the_scale_whatever_the_recipes_order(make_recipe):
    settings = plugins(compute="fp32")
    del settings["precision"]
    resolved, seen = make_recipe(settings, training={"max_steps": 5}), []
    observers = {"before": Looks(seen), "scales": Scales(seen), "after": Looks(seen)}
    with session(resolved, Environment(), RunDirectory(resolved.recipe.run.dir), observers) as trainer:
        trainer.train(Quiet(), Quiet())
    assert seen[:3] == ["scales", "before", "after"] and len(seen) == 15


class Looks(Plugin):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    @hookimpl
    def post_reduce(self):
        self.seen.append(self.name)


class Scales(Looks):
    @hookimpl
    def precision(self):
        return SINGLE
