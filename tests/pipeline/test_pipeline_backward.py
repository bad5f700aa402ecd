"""Split backward: what I leaves alone, what W does, and how much is held between them."""

import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.autograd.graph import get_gradient_edge

from camshaft_pipeline.deferral import Deferral

PLACE = (0, 0)


class Net(nn.Module):
    """An embedding, linear layers with and without bias, norms, one layer used twice, one with a frozen weight."""

    def __init__(self, width=8):
        super().__init__()
        self.table = nn.Embedding(11, width, padding_idx=3)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width, bias=False)
        self.twice = nn.Linear(width, width)
        self.part = nn.Linear(width, width)
        self.part.weight.requires_grad_(False)
        self.unused = nn.Linear(width, width)

    def forward(self, tokens, hidden):
        hidden = hidden + self.table(tokens)
        hidden = hidden + self.down(torch.relu(self.up(self.norm(hidden))))
        return self.part(self.twice(torch.tanh(self.twice(hidden))))


def build(**changes):
    torch.manual_seed(4)
    return Net(**changes).double()


def watched(net):
    deferral = Deferral({0: [each for each in net.parameters() if each.requires_grad]}, torch.device("cpu"))
    deferral.watch(net)
    return deferral


def inputs():
    torch.manual_seed(5)
    tokens = torch.tensor([[3, 1, 4], [1, 5, 9]])
    return tokens, torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)


def gradients(net):
    return {name: each.grad for name, each in net.named_parameters()}


def split(net, deferral, leaf=True):
    tokens, start, gradient = inputs()
    hidden = start.clone().requires_grad_(leaf)
    out = net(tokens, hidden)
    return deferral.inputs(PLACE, get_gradient_edge(out), gradient, [hidden] if leaf else [])


def whole(net, leaf=True):
    tokens, start, gradient = inputs()
    hidden = start.clone().requires_grad_(leaf)
    net(tokens, hidden).backward(gradient)
    return hidden.grad


@pytest.mark.parametrize("leaf", [True, False], ids=["inner-stage", "first-stage"])
def test_both_halves_make_what_one_backward_makes(leaf):
    plain, net = build(), build()
    towards = whole(plain, leaf)
    deferral = watched(net)
    seen = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda each, name=name: seen.append(name))
    found = split(net, deferral, leaf)
    assert all(each is None for each in gradients(net).values()) and seen == [], "I touches no parameter"
    if leaf:
        torch.testing.assert_close(found[0], towards, rtol=1e-13, atol=1e-13)
    deferral.weights(PLACE)
    expected = gradients(plain)
    assert sorted(seen) == sorted(name for name, each in expected.items() if each is not None), "each hook once"
    for name, each in gradients(net).items():
        assert (each is None) == (expected[name] is None), name
        if each is not None:
            torch.testing.assert_close(each, expected[name], rtol=1e-13, atol=1e-13)


def test_a_second_microbatch_adds_up():
    plain, net = build(), build()
    deferral = watched(net)
    for _ in range(2):
        whole(plain)
        split(net, deferral)
        deferral.weights(PLACE)
    for name, each in gradients(net).items():
        if each is not None:
            torch.testing.assert_close(each, dict(plain.named_parameters())[name].grad, rtol=1e-13, atol=1e-13)


def test_a_backward_that_is_not_split_makes_everything_at_once():
    plain, net = build(), build()
    watched(net)
    torch.testing.assert_close(whole(net), whole(plain), rtol=1e-13, atol=1e-13)
    for name, each in gradients(net).items():
        expected = dict(plain.named_parameters())[name].grad
        assert (each is None) == (expected is None)
        if each is not None:
            torch.testing.assert_close(each, expected, rtol=1e-13, atol=1e-13)


def test_layers_before_which_nothing_trains_are_met_all_the_same():
    plain, net = build(), build()
    for each in (plain, net):
        for frozen in (each.table, each.norm):
            frozen.requires_grad_(False)
    deferral = watched(net)
    whole(plain, leaf=False)
    split(net, deferral, leaf=False)
    deferral.weights(PLACE)
    assert net.up.weight.grad is not None
    torch.testing.assert_close(net.up.weight.grad, plain.up.weight.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_what_torch_computes(dtype):
    plain, net = build().float(), build().float()
    deferral = watched(net)
    tokens, start, gradient = inputs()
    with torch.autocast("cpu", dtype=dtype):
        expected = plain(tokens, start.float())
        out = net(tokens, start.float())
    assert out.dtype == expected.dtype == dtype and torch.equal(out, expected)
    expected.backward(gradient.to(dtype))
    deferral.inputs(PLACE, get_gradient_edge(out), gradient.to(dtype), [])
    deferral.weights(PLACE)
    for name, each in gradients(net).items():
        other = dict(plain.named_parameters())[name].grad
        if other is not None:
            # torch rounds the sum of a weight's two uses, which here is made in fp32
            bound = {"rtol": 1e-2, "atol": 1e-2} if name.startswith("twice") else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(each, other, **bound)


class Holder:
    """What a graph holds of one tensor that it saved; gone when the graph lets go."""

    def __init__(self, tensor):
        self.tensor = tensor


class Chain(nn.Module):
    """A linear layer whose neighbours keep large tensors for their own backward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, hidden):
        out = self.linear(hidden)
        for _ in range(8):
            out = torch.sigmoid(out) * out.tanh()  # each keeps three tensors of this size until I
        return out


def test_between_both_halves_only_pairs_are_held():
    net = Chain()
    deferral = watched(net)
    hidden = torch.randn(1000, 16, requires_grad=True)
    holders = weakref.WeakSet()

    def pack(tensor):
        holder = Holder(tensor.detach())
        holders.add(holder)
        return holder

    def held():
        return sum({each.tensor.data_ptr(): each.tensor.nbytes for each in holders}.values())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        out = net(hidden)
    edge = get_gradient_edge(out)
    del out
    assert held() > 16 * hidden.nbytes, "the graph is there"
    deferral.inputs(PLACE, edge, torch.ones(1000, 16), [hidden])
    assert held() == 0, "the graph is gone"
    kept = deferral._kept[PLACE]
    (product,) = kept.products
    cells = [cell.cell_contents for cell in product.compute.__closure__]
    pair = {each.data_ptr(): each.nbytes for each in cells if isinstance(each, torch.Tensor)}
    assert kept.others == [] and product.leaves[0] is net.linear.weight
    assert sum(pair.values()) == 2 * hidden.nbytes, "the input and the gradient of the output"
    del kept, product, cells
    deferral.weights(PLACE)
    assert PLACE not in deferral._kept and net.linear.weight.grad is not None


def test_closing_gives_modules_their_forwards_back():
    net = build()
    deferral = watched(net)
    assert "forward" in vars(net.up) and "forward" in vars(net.table) and "forward" not in vars(net.norm)
    deferral.close()
    assert not any("forward" in vars(module) for module in net.modules())


class Other(nn.Linear):
    """A linear layer whose computation is not torch's own."""

    def forward(self, source):
        return super().forward(source) * 2


def test_layers_with_a_forward_of_their_own_are_left_alone():
    torch.manual_seed(6)
    net = nn.Sequential(Other(4, 4), nn.Linear(4, 4)).double()
    plain = nn.Sequential(Other(4, 4), nn.Linear(4, 4)).double()
    plain.load_state_dict(net.state_dict())
    deferral = watched(net)
    start = torch.randn(3, 4, dtype=torch.float64)
    plain(start).sum().backward()
    deferral.inputs(PLACE, get_gradient_edge(net(start)), torch.ones(3, 4, dtype=torch.float64), [])
    assert len(deferral._kept[PLACE].products) == 1 and len(deferral._kept[PLACE].others) == 2
    deferral.weights(PLACE)
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-13, atol=1e-13)


def test_recomputed_layers_are_split_too():
    plain, net = build(), build()
    deferral = watched(net)
    whole(plain)
    tokens, start, gradient = inputs()
    hidden = start.clone().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(net, tokens, hidden, use_reentrant=False)
    deferral.inputs(PLACE, get_gradient_edge(out), gradient, [hidden])
    assert all(each is None for each in gradients(net).values())
    deferral.weights(PLACE)
    for name, each in gradients(net).items():
        if each is not None:
            torch.testing.assert_close(each, dict(plain.named_parameters())[name].grad, rtol=1e-13, atol=1e-13)
    assert net.up.weight.grad is not None
