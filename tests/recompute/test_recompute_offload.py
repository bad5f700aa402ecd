"""Tensors that wait on the host: what leaves, when it comes back, and that it is what it was."""

import gc

import pytest
import torch
from recompute_modules import CPU, assert_equal, build, run
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from camshaft_recompute import offload
from camshaft_recompute.offload import Line, Offloaded
from camshaft_recompute.tally import Tally


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


def test_a_small_part_of_a_large_memory_stays():
    """Sent, all of the memory would wait on the host, and none of it would be free."""
    sent = []

    class Layer(nn.Module):
        def forward(self, hidden, part):
            return (table[:part] * hidden).sum()

    table = torch.randn(64)
    layer = Layer()
    made = offloaded(layer)
    away = made._line.lane.away
    made._line.lane.away = lambda flat: (sent.append(flat.numel()), away(flat))[1]
    for part, wanted in ((31, []), (32, [64 * 4])):
        sent.clear()
        layer(torch.randn(1, requires_grad=True) * 1.0, part).backward()
        assert [size for size in sent if size > 4] == wanted


def test_modules_of_another_microbatch_or_stage_are_not_sent_for():
    """Their backward comes at another time, and what came back would fill the device until then."""
    places = iter([(0, 0), (0, 0), (0, 1), (1, 1), (1, 1)])
    line = Line(CPU, lambda: next(places))
    loads = [line.next(str(number)) for number in range(5)]
    assert [each._before for each in loads] == [None, loads[0], None, None, loads[3]]


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


def test_a_graph_that_is_given_up_leaves_nothing():
    """A batch that did not fit: what stays on the device must go with its graph, and not hold it."""
    held = []

    class Layer(nn.Module):
        def forward(self, hidden):
            made = torch.sigmoid(hidden)  # small, and saved as the result of what made it
            part = torch.sigmoid(torch.cat((hidden, hidden, hidden)))[:2]
            held.extend(StorageWeakRef(each.untyped_storage()) for each in (made, part))
            return made.sum() + part.exp().sum()

    layer = Layer()
    offloaded(layer, least=600)
    gc.disable()
    try:
        layer(torch.randn(10, 10, requires_grad=True) * 1.0)
        assert len(held) == 2 and all(each.expired() for each in held)
    finally:
        gc.enable()


class Writes(nn.Module):
    """Saves what a sigmoid made, and then writes into it as ``write`` does."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, hidden):
        made = torch.sigmoid(hidden * 2.0)
        self.write(made)
        return made.sum() * 1.0


WRITES = {
    "all of it": lambda made: made.detach().mul_(2),
    "a view of it": lambda made: made.detach()[1:, :2].zero_(),
    "another's name for it": lambda made: made.detach().view(-1).narrow(0, 3, 2).add_(1),
}


@pytest.mark.parametrize("least", [0, 2**30], ids=["left", "stayed"])
@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_in_place_since_is_refused_as_without_it(write, least):
    """The copy may be on its way while it is written: backward must say so, and not take whichever came first."""
    for away in (False, True):
        net = Writes(WRITES[write])
        if away:
            offloaded(net, least)
        loss = net(torch.randn(6, 5, requires_grad=True))
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace operation: \[torch.FloatTensor \[6, 5\]\]"
        ) as said:
            loss.backward()
        assert "at version 1; expected version 0 instead" in str(said.value)
        assert ("module 'net'" in str(said.value)) == away


def test_what_was_written_in_place_behind_the_module_is_refused():
    net = Writes(lambda made: held.append(made.detach()))
    held = []
    offloaded(net)
    loss = net(torch.randn(6, 5, requires_grad=True))
    held[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_write_through_data_is_noticed_by_nobody():
    """As the plugin's text says: autograd takes what was written, and the host has what was there when it left."""
    found = []
    for away in (False, True):
        held = []
        net = Writes(lambda made, held=held: held.append(made.data))
        if away:
            offloaded(net)
        hidden = torch.zeros(6, 5, requires_grad=True)
        loss = net(hidden)
        held[0].zero_()
        loss.backward()
        found.append(hidden.grad)
    assert torch.equal(found[0], torch.zeros(6, 5)) and torch.equal(found[1], torch.full((6, 5), 0.5))


def test_what_autograd_allows_is_right():
    """Written before it is saved, saved again after it was written, and a second backward."""

    class Allowed(nn.Module):
        def forward(self, hidden):
            made = (hidden * 2.0).clone()
            made.mul_(3)
            first = made.sigmoid()
            made.add_(1)  # nobody has saved it
            one, other = torch.unsafe_chunk(made, 2)  # counters of their own, on one memory
            second = one.exp() * other.sigmoid()
            return first.sum() + second.sum() + made.detach().relu_().sum()

    found = []
    for away in (False, True):
        net = Allowed()
        if away:
            offloaded(net)
        torch.manual_seed(4)
        hidden = torch.randn(6, 5, requires_grad=True)
        loss = net(hidden)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(hidden.grad)
    assert torch.equal(*found)


def test_memory_that_was_written_by_another_name_is_sent_again():
    """Chunks have counters of their own: what the whole was when it left is not what they are now."""

    class Again(nn.Module):
        def forward(self, hidden):
            made = (hidden * 1.0).clone()
            part, _ = torch.unsafe_chunk(made, 2)
            held.append(made.sin())  # saved, and never asked for
            with torch.no_grad():
                made.mul_(2)
            return (part * part).sum()

    found, held = [], []
    for away in (False, True):
        net = Again()
        if away:
            offloaded(net)
        torch.manual_seed(4)
        hidden = torch.randn(6, 5, requires_grad=True)
        net(hidden).backward()
        found.append(hidden.grad)
    assert torch.equal(*found)


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
