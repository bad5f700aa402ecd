"""One module by itself: what it keeps, how it runs again, and what is refused."""

import gc
from types import SimpleNamespace

import pytest
import torch
from recompute_modules import CPU, KEEP, assert_equal, build, inputs, region, run
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from camshaft_recompute import ambient
from camshaft_recompute.kinds import makes
from camshaft_recompute.region import Region
from camshaft_recompute.tally import Tally


@pytest.mark.parametrize("keep", KEEP)
def test_gradients_and_generators_are_equal_in_every_bit(keep):
    wanted, net = run(build()), build()
    made = region(net, KEEP[keep])
    assert_equal(run(net), wanted)
    assert net.calls == 4, "each of two calls ran again, once"
    made.close()
    assert "forward" not in vars(net)


@pytest.mark.parametrize("broken", ["generators", "autocast"])
def test_the_comparison_sees_what_is_not_restored(monkeypatch, broken):
    """Without the random numbers of the first run masks differ; without its autocast, dtypes do."""
    if broken == "generators":
        monkeypatch.setattr(ambient, "_set", lambda states, device: None)
        wanted, net = run(build()), build()
        region(net)
        found = run(net)
        assert not torch.equal(found[0], wanted[0])
        return
    monkeypatch.setattr(ambient.Ambient, "restored", lambda self: torch.autocast("cpu", enabled=False))
    net = build().float()
    region(net)
    hidden, shift = (each.detach().float().requires_grad_() for each in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made, _ = net(hidden, {"shift": (shift, None)}, scale=1.5)
    with pytest.raises(RuntimeError, match=r"'net' computed something else the second time: it saved .*float32"):
        made.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", KEEP)
def test_autocast(keep, dtype):
    found = []
    for keeps in (False, True):
        net = build().float()
        if keeps:
            region(net, KEEP[keep])
        hidden, shift = (each.detach().float().requires_grad_() for each in inputs())
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=dtype):
            made, _ = net(hidden, {"shift": (shift, None)}, scale=1.5)
        (made * 64).sum().backward()
        found.append([hidden.grad, shift.grad, *(each.grad for each in net.parameters())])
    assert_equal(found[1], found[0])


def test_without_gradients_nothing_is_done():
    net = build()
    region(net)
    hidden, shift = inputs()
    with torch.no_grad():
        made, _ = net(hidden, {"shift": (shift, None)}, scale=1.0)
    assert made.grad_fn is None and net.calls == 1
    for each in (hidden, shift, *net.parameters()):
        each.requires_grad_(False)
    made, _ = net(hidden, {"shift": (shift, None)}, scale=1.0)
    assert made.grad_fn is None and net.calls == 2


@pytest.mark.parametrize("keep", KEEP)
def test_a_discarded_graph_leaves_nothing(keep):
    """Kept results know the graph that they are in, which would hold them for ever."""
    net = build()
    region(net, KEEP[keep])
    leaf, shift = inputs()
    hidden = leaf * 1.0
    made, _ = net(hidden, {"shift": (shift, None)}, scale=1.0)
    storage = StorageWeakRef(hidden.untyped_storage())
    gc.disable()
    try:
        del hidden
        assert not storage.expired(), "an input is held"
        del made, _
        assert storage.expired(), "without the garbage collector's help"
    finally:
        gc.enable()


def test_a_failed_forward_leaves_nothing():
    class Fails(nn.Module):
        def forward(self, hidden):
            self.held = StorageWeakRef((made := torch.mm(hidden, hidden)).untyped_storage())
            torch.sigmoid(made)
            raise ValueError("no")

    net = Fails()
    region(net, makes)
    with pytest.raises(ValueError, match="no"):
        net(torch.randn(3, 3, requires_grad=True))
    gc.collect()
    assert net.held.expired()


class Stateful(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.count = how, 0

    def forward(self, hidden):
        self.count += 1
        if self.how == "fewer" and self.count > 1:
            return hidden
        if self.how == "others" and self.count > 1:
            return torch.sigmoid(hidden[:1])
        return torch.tanh(torch.sigmoid(hidden))


@pytest.mark.parametrize(("how", "said"), [("fewer", "0 tensors for backward, not"), ("others", r"\[1, 4\]")])
def test_a_second_run_that_differs_is_refused(how, said):
    net = Stateful(how)
    region(net, name="model.layers.0")
    made = net(torch.randn(3, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match=f"'model.layers.0' computed something else the second time.*{said}"):
        made.sum().backward()


def test_an_input_that_was_written_into_is_refused():
    net = nn.Sequential(nn.Tanh(), nn.Sigmoid())
    region(net)
    hidden = torch.randn(3, 4, requires_grad=True) * 2
    made = net(hidden)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match=r"'net' cannot be run again: an input \[3, 4\] was changed in place"):
        made.sum().backward()


def test_a_graph_that_is_used_twice():
    hidden, shift = inputs()
    net = build()
    region(net)
    made, _ = net(hidden, {"shift": (shift, None)}, scale=1.0)
    made.sum().backward(retain_graph=True)
    once = hidden.grad.clone()
    made.sum().backward()
    assert torch.equal(hidden.grad, 2 * once) and net.calls == 2, "it ran again once, and not a third time"


def test_second_derivatives():
    found = []
    for keeps in (False, True):
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        torch.manual_seed(1)
        for each in net.parameters():
            nn.init.normal_(each)
        if keeps:
            region(net)
        hidden = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(net(hidden).sum(), hidden, create_graph=True)
        first.square().sum().backward()
        found.append([hidden.grad, *(each.grad for each in net.parameters() if each.grad is not None)])
    assert_equal(found[1], found[0])


def test_a_forward_that_another_plugin_put_there_comes_back():
    net = nn.Linear(3, 3)
    net.forward = lambda hidden: torch.zeros(())
    before = net.forward
    made = region(net)
    assert net.forward is not before and float(net(torch.ones(3))) == 0.0
    made.close()
    assert net.forward is before


def test_a_forward_that_is_given_up_is_not_counted():
    tally = Tally(state=SimpleNamespace(microbatch=0, stage=0))
    net = nn.Sequential(nn.Tanh(), nn.Sigmoid())
    made = Region("net", net, CPU, tally, None)
    made.install()
    for rows in (6, 3):  # a batch that does not fit, and a half of it
        tally.begin()
        net(torch.randn(rows, 4, requires_grad=True)).sum().backward()
    assert [each.inputs for each in tally.calls] == [48]
    assert tally.saved_bytes == 2 * 48 - 48, "both results, and the input, which autograd would not have held"


def test_inputs_go_as_soon_as_the_module_has_run_again():
    """The rest of its backward needs them no more."""
    gone = []

    class Layer(nn.Module):
        def forward(self, hidden):
            made = torch.sigmoid(hidden + 1.0)
            made.register_hook(lambda gradient: gone.append(memory.expired()))
            return made.tanh()

    layer = Layer()
    region(layer)
    leaf = torch.randn(4, 5, requires_grad=True)
    hidden = leaf * 1.0
    memory = StorageWeakRef(hidden.untyped_storage())
    made = layer(hidden)
    del hidden
    assert not memory.expired()
    made.sum().backward()
    assert gone == [True]
