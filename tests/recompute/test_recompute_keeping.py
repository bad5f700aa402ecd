"""Which results are kept between both runs of a module, and which are not because that would be wrong."""

import pytest
import torch
from recompute_modules import CPU, KEEP, assert_equal, build, region, run
from test_recompute_bytes import Living
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import get_gradient_edge

from camshaft.testing.ranks import run_ranks
from camshaft_pipeline.deferral import Deferral
from camshaft_recompute.keeping import Keeper, _First
from camshaft_recompute.kinds import makes, of_kinds


class Mixed(nn.Module):
    """Results of products that are written into in every way."""

    def __init__(self, how):
        super().__init__()
        self.how, self.one, self.two = how, nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, hidden):
        made = self.one(hidden)
        if self.how == "in place":
            made.mul_(2)
        elif self.how == "through a view":
            made.unflatten(-1, (2, 3))[:, :, 0].add_(1)
        elif self.how == "a function's":
            made = Doubles.apply(made)
        elif self.how == "relu":
            made = torch.relu_(made)
        return self.two(torch.sigmoid(made)).tanh()


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial):
        ctx.mark_dirty(partial)
        return partial.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@pytest.mark.parametrize("how", ["not", "in place", "through a view", "a function's", "relu"])
@pytest.mark.parametrize("rank", [2, 3])
def test_results_that_are_written_into_are_not_kept(how, rank):
    found, kept = [], []
    for keeps in (False, True):
        torch.manual_seed(2)
        net = Mixed(how)
        if keeps:
            made = region(net, of_kinds(("products",)))
            made.keeper = Watched(made.keeper.keep, kept)
        hidden = torch.randn(*(4, 2)[: rank - 1], 6, requires_grad=True)
        net(hidden).sum().backward()
        found.append([hidden.grad, *(each.grad for each in net.parameters())])
    assert_equal(found[1], found[0])
    assert kept == [2 if how == "not" else 1]


class Exchanges(nn.Module):
    """Sums a product's result over ranks where it lies, of which no version tells."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 6, bias=False)

    def forward(self, hidden):
        made = self.one(hidden)
        with torch.no_grad():
            torch.distributed.all_reduce(made)
        return torch.sigmoid(made)


def exchanged(rank, world_size):
    found = []
    for keeps in (False, True):
        torch.manual_seed(2)
        net = Exchanges()
        if keeps:
            region(net, KEEP["products"])
        hidden = torch.randn(4, 6, requires_grad=True)
        net(hidden).sum().backward()
        found.append(hidden.grad)
    return torch.equal(*found)


def test_results_that_ranks_exchange_are_not_kept():
    assert run_ranks(2, exchanged, timeout_s=60) == [True, True]


class Hands(nn.Module):
    """Gives a product's result away, which others then write into: no operation needs it for backward."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 6, bias=False)

    def forward(self, hidden):
        made = self.one(hidden)
        return made, torch.sigmoid(made)


def test_results_that_are_written_into_behind_the_module_are_made_anew():
    found = []
    for keeps in (False, True):
        torch.manual_seed(2)
        net = Hands()
        if keeps:
            region(net, KEEP["products"])
        hidden = torch.randn(4, 6, requires_grad=True)
        product, out = net(hidden)
        product.mul_(3)
        (product.sum() + out.sum()).backward()
        found.append([hidden.grad, net.one.weight.grad])
    assert_equal(found[1], found[0])


class Scratch(torch.autograd.Function):
    """A kernel that writes over a copy of its input, of which torch is not told."""

    @staticmethod
    def forward(ctx, source, how):
        made = source.clone() if how == "clone" else source.double() if how == "cast" else source.new_ones(source.shape)
        made.numpy()[:] *= 2.0
        return made

    @staticmethod
    def backward(ctx, gradient):
        return gradient.float() * 2, None


@pytest.mark.parametrize("how", ["clone", "cast", "filled"])
def test_memory_that_kernels_write_over_is_not_kept(how):
    class Net(nn.Module):
        def forward(self, hidden):
            return torch.sigmoid(Scratch.apply(hidden * 1.0, how))

    found = []
    for keeps in (False, True):
        net = Net()
        if keeps:
            region(net, of_kinds(("aten.clone", "aten._to_copy", "aten.new_ones")))
        hidden = torch.linspace(-1, 1, 12).requires_grad_()
        net(hidden).sum().backward()
        found.append(hidden.grad)
    assert torch.equal(*found)


def test_results_of_another_operation_are_refused():
    """The same shape and dtype, so nothing else would tell them apart."""

    class Changes(nn.Module):
        calls = 0

        def forward(self, hidden):
            self.calls += 1
            made = torch.mm(hidden, hidden) if self.calls == 1 else torch.addmm(hidden, hidden, hidden)
            return torch.sigmoid(made)

    net = Changes()
    region(net, KEEP["several"])
    made = net(torch.randn(4, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"calls aten.addmm where its first run had called aten.mm"):
        made.sum().backward()


class Watched(Keeper):
    def __init__(self, keep, kept):
        super().__init__(keep)
        self.kept = kept

    def first(self, saved):
        keeper = super().first(saved)
        outer = self

        class Counts:
            def __enter__(self):
                self.store = keeper.__enter__()
                return self.store

            def __exit__(self, *error):
                done = keeper.__exit__(*error)
                outer.kept.append(len(self.store.results))
                return done

        return Counts()


def test_the_last_results_are_not_kept_because_nobody_asks_for_them_again():
    kept = []
    net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4))
    made = region(net, of_kinds(("products",)))
    made.keeper = Watched(made.keeper.keep, kept)
    net(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert kept == [1], "the second product's result is in nobody's backward"


def test_attention_with_dropout_is_not_kept():
    """Kept, it would leave the generator where it was for the dropout behind it."""

    class Attends(nn.Module):
        def forward(self, q):
            made = torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
            return torch.nn.functional.dropout(made, 0.5).tanh()

    found = []
    for keep in (None, "none", of_kinds(("attention", "softmax", "batched_products")), makes):
        net = Attends()
        if keep is not None:
            region(net, None if keep == "none" else keep)
        torch.manual_seed(7)
        q = torch.randn(2, 2, 4, 8, requires_grad=True)
        net(q).sum().backward()
        found.append(q.grad)
    assert all(torch.equal(each, found[0]) for each in found)


def test_modes_see_no_operation_where_nothing_is_kept(monkeypatch):
    """Mode `full` costs hooks on saved tensors alone: no operation passes through Python."""
    monkeypatch.setattr(_First, "__torch_dispatch__", lambda *_: pytest.fail("a mode is on"))
    net = build()
    region(net)
    run(net)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep", ["full", "products"])
def test_a_compiler_gets_torchs_own_form_and_one_graph_for_all_layers(keep):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, hidden):
            return hidden + self.down(torch.nn.functional.silu(self.up(self.norm(hidden))))

    torch._dynamo.reset()
    torch.manual_seed(1)
    graphs, layers = CompileCounterWithBackend("aot_eager"), [Layer() for _ in range(3)]
    first = torch.randn(4, 8, requires_grad=True)
    (wanted,) = torch.autograd.grad(layers[2](layers[1](layers[0](first))).sum(), first)
    regions = [region(layer, KEEP[keep], str(number)) for number, layer in enumerate(layers)]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=graphs, fullgraph=True)
    (found,) = torch.autograd.grad(layers[2](layers[1](layers[0](first))).sum(), first)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert graphs.frame_count == 1 and all(each.compiled for each in regions)
    compiled = layers[0].forward
    regions[0].close()
    assert layers[0].forward is compiled and regions[0].plain, "the compiler's forward stays where it is"


@pytest.mark.parametrize("keep", ["full", "products"])
def test_between_both_halves_of_a_split_backward_only_pairs_are_held(keep):
    """I lets the module run again and notes pairs for W; what else was made again goes when I is over."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16, bias=False)

        def forward(self, hidden):
            out = self.linear(hidden)
            for _ in range(8):
                out = torch.sigmoid(out) * out.tanh()
            return out

    torch.manual_seed(1)
    plain, net = Chain(), Chain()
    plain.load_state_dict(net.state_dict())
    region(net, KEEP[keep])
    deferral = Deferral({0: list(net.parameters())}, CPU)
    deferral.watch(net)
    hidden, gradient = torch.randn(1000, 16, requires_grad=True), torch.randn(1000, 16)
    with Living() as living:
        made = net(hidden)
        edge = get_gradient_edge(made)
        del made
        (towards,) = deferral.inputs((0, 0), edge, gradient, [hidden])
        del edge
    held = living.bytes() - towards.nbytes
    assert held == hidden.nbytes, "the gradient of the product; its input is the module's own"
    assert net.linear.weight.grad is None
    deferral.weights((0, 0))
    (wanted, of_weight) = torch.autograd.grad(plain(hidden), [hidden, plain.linear.weight], gradient)
    assert torch.equal(towards, wanted) and torch.equal(net.linear.weight.grad, of_weight)
