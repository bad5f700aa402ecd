"""One module by itself: what it keeps, how it runs again, and what is refused."""

import gc
from types import SimpleNamespace

import pytest
import torch
from test_recompute_bytes import Living
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef

from camshaft_pipeline.deferral import Deferral
from camshaft_recompute import ambient, offload
from camshaft_recompute.keeping import Keeper, _First
from camshaft_recompute.kinds import makes, of_kinds
from camshaft_recompute.offload import Line, Offloaded
from camshaft_recompute.region import Region
from camshaft_recompute.tally import Tally

CPU = torch.device("cpu")


class Net(nn.Module):
    """Dropout, a layer that is used twice, inputs in nests, a result that is written into."""

    def __init__(self):
        super().__init__()
        self.norm, self.twice, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.drop = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, hidden, more, *, scale):
        self.calls += 1
        out = self.twice(torch.tanh(self.twice(self.norm(hidden) + more["shift"][0])))
        out = self.drop(torch.nn.functional.silu(out))
        made = self.down(out)
        made.mul_(scale)
        return hidden + torch.sigmoid(made), out.detach()


def build(seed=3):
    torch.manual_seed(seed)
    return Net().double()


def inputs():
    torch.manual_seed(4)
    hidden, shift = (torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return hidden, shift


def run(net, autocast=None):
    """Gradients of two steps in a row, and the numbers that the generator has for who comes next."""
    hidden, shift = inputs()
    torch.manual_seed(5)
    made, _ = net(hidden, {"shift": (shift, None)}, scale=1.5)
    after = torch.rand(2)
    made, _ = net(made, {"shift": (shift, None)}, scale=0.5)
    made.square().sum().backward()
    return [hidden.grad, shift.grad, *(each.grad for each in net.parameters()), after, torch.rand(2)]


KEEP = {
    "full": None,
    "products": of_kinds(("products",)),
    "several": of_kinds(("products", "norms", "activations")),
    "by name": of_kinds(("aten.addmm", "aten.ta*")),
    "everything": makes,
}


def region(net, keep=None, name="net"):
    found = Region(name, net, CPU, Tally(), keep)
    found.install()
    return found


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


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


def offloaded(net, least=0):
    line = Line(CPU, lambda: (0, 0))
    made = Offloaded("net", net, CPU, Tally(), least, line)
    made.install()
    return made


def test_what_waits_on_the_host_comes_back_equal():
    wanted, net = run(build()), build()
    made = offloaded(net)
    assert_equal(run(net), wanted)
    assert net.calls == 2, "nothing ran again"
    made.close()
    assert "forward" not in vars(net)


def test_memory_of_the_device_is_released_and_comes_back_for_one_module_ahead():
    """Three layers: their insides leave; the backward of the last brings back its own and those of the one before."""

    class Layer(nn.Module):
        def forward(self, hidden):
            return hidden + torch.sigmoid(torch.sigmoid(hidden).tanh())

    line, sent, layers = Line(CPU, lambda: (0, 0)), [], [Layer() for _ in range(3)]
    back = []
    away, returned = line.lane.away, line.lane.back

    def spy(flat):
        sent.append(StorageWeakRef(flat.untyped_storage()))
        return away(flat)

    def spy_back(host):
        back.append(host)
        return returned(host)

    line.lane.away, line.lane.back = spy, spy_back
    for number, layer in enumerate(layers):
        Offloaded(str(number), layer, CPU, Tally(), 0, line).install()
    hidden = torch.randn(5, 4, requires_grad=True) * 1.0
    made, seen = hidden, []
    for layer in layers:
        made = layer(made)
        made.register_hook(lambda gradient: seen.append(len(back)))
    assert len(sent) == 9 and all(each.expired() for each in sent), "sigmoid, sigmoid and tanh of each layer"
    made.sum().backward()
    assert seen == [0, 6, 9], "when the last layer's backward begins, when the middle one's does, and the first one's"


def test_small_tensors_parameters_and_shared_inputs_stay():
    sent = []

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, hidden, table):
            return (hidden @ self.weight.t() * table).tanh() + hidden[:, :1].sigmoid()

    layer = Layer()
    made = offloaded(layer, least=4096)
    away = made._line.lane.away
    made._line.lane.away = lambda flat: (sent.append(flat.numel()), away(flat))[1]
    hidden, table = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)
    layer(hidden * 1, table).sum().backward()
    assert sent == [32 * 64 * 4] * 2, "the input, and the last result: each once"


def test_strides_and_offsets_come_back():
    class Slices(nn.Module):
        def forward(self, hidden):
            one, other = (hidden * 2).chunk(2, -1)
            return one.t().sigmoid() * other.transpose(0, 1)[:, :3].sum() + one.t().exp()

    found = []
    for away in (False, True):
        net = Slices()
        if away:
            offloaded(net)
        torch.manual_seed(3)
        hidden = torch.randn(6, 8, requires_grad=True)
        net(hidden).sum().backward()
        found.append(hidden.grad)
    assert torch.equal(*found)


def test_a_forward_that_another_plugin_put_there_comes_back():
    net = nn.Linear(3, 3)
    net.forward = lambda hidden: torch.zeros(())
    before = net.forward
    made = region(net)
    assert net.forward is not before and float(net(torch.ones(3))) == 0.0
    made.close()
    assert net.forward is before


def test_modes_see_no_operation_where_nothing_is_kept(monkeypatch):
    """Mode `full` costs hooks on saved tensors alone: no operation passes through Python."""
    monkeypatch.setattr(_First, "__torch_dispatch__", lambda *_: pytest.fail("a mode is on"))
    net = build()
    region(net)
    run(net)


class Recorded:
    """Stands for a stream of CUDA."""

    def __init__(self, name, told):
        self.name, self.told = name, told

    def wait_stream(self, other):
        self.told.append(f"{self.name} waits for all of {other.name}")

    def record_event(self):
        self.told.append(f"{self.name} marks")
        return f"mark of {self.name}"

    def wait_event(self, event):
        self.told.append(f"{self.name} waits for {event}")

    def __enter__(self):
        self.told.append(f"on {self.name}")

    def __exit__(self, *error):
        self.told.append("off")


def test_streams_wait_for_each_other_and_memory_for_both(monkeypatch):
    """What a GPU would be asked for, in order: the copies themselves run on this machine."""
    told = []
    main, side = Recorded("main", told), Recorded("side", told)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append(f"kept for {stream.name}"))
    monkeypatch.setattr(offload, "_pinned", torch.empty_like)
    lane = offload.Lane(torch.device("cuda"))
    lane._device = CPU
    flat = torch.arange(8, dtype=torch.uint8)
    host, sent = lane.away(flat)
    assert told == ["side waits for all of main", "on side", "kept for side", "off", "side marks"]
    assert torch.equal(host, flat) and host.data_ptr() != flat.data_ptr() and sent is not None
    told.clear()
    back, event = lane.back(host)
    lane.arrive(back, event)
    assert told == ["on side", "off", "side marks", "main waits for mark of side", "kept for main"]
    assert torch.equal(back, flat)


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
