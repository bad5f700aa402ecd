"""Messages: between ranks, counted by the ledger's observer, started together where a device's queue is in order."""

import pipeline_runs as runs
import pytest
import torch
import torch.distributed as dist

from camshaft.comm import Channel, Message
from camshaft.program import Action, Kind
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft_pipeline import transport
from camshaft_pipeline.schedules import make
from camshaft_pipeline.transport import Form


def exchange(rank, world_size):
    channel = Channel(dist.group.WORLD, "tests", "pp")
    calls = []
    Channel.observer = calls.append
    peer = 1 - rank
    sent = [torch.full((5,), 10.0 * rank + index) for index in range(3)]
    got = [torch.empty(5) for _ in range(3)]
    pending = [channel.recv(each, peer, "handlers") for each in got]
    pending += [channel.send(each, peer, "handlers") for each in sent]
    more = torch.empty(2, dtype=torch.int64)
    both = (Message(more, peer, False), Message(torch.tensor([7, rank]), peer, True))
    for each in [*pending, *channel.messages(both, "handlers")]:
        each.wait()
    return [each[0].item() for each in got], more.tolist(), [(call.op, call.bytes) for call in calls]


def test_messages_come_in_the_order_of_their_sends():
    for rank, (values, more, calls) in enumerate(run_ranks(2, exchange)):
        peer = 1 - rank
        assert values == [10.0 * peer, 10.0 * peer + 1, 10.0 * peer + 2] and more == [7, peer]
        assert calls == [("recv", 0)] * 3 + [("send", 20)] * 3 + [("recv", 0), ("send", 16)]


def unequal(rank, world_size):
    from datetime import timedelta

    channel = Channel(dist.group.WORLD, "tests", "pp", timedelta(seconds=2))
    if rank:
        channel.recv(torch.empty(4), 0, "handlers").wait()
    else:
        channel.send(torch.empty(5), 1, "handlers").wait()


def test_messages_of_unequal_lengths_fail_at_their_time_out():
    with pytest.raises(RankFailed, match=r"(?s)Timed out|closed"):
        run_ranks(2, unequal)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 7)])
@pytest.mark.parametrize("trains", [True, False])
def test_a_form_is_what_was_told(shape, trains):
    form = Form(shape, torch.bfloat16, trains)
    assert Form.unpack(form.pack(torch.device("cpu")).tolist()) == form
    assert Form.of(form.empty(torch.device("cpu")).requires_grad_(trains)) == form


def test_neighbouring_transfers_go_together():
    program = make("interleaved_1f1b", 2, 4).programs[0]
    apart, joined = (transport._runs(program, together=together) for together in (False, True))
    transfers = [action for action in program if action in apart]
    assert all(apart[action] == (action,) for action in transfers)
    assert [each for action in transfers for each in joined[action]] == transfers
    assert any(len(joined[action]) > 1 for action in transfers)
    compute = Action(Kind.F, 0, 0)
    assert compute not in apart


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
def test_strictly_ordered_queues_make_the_same_numbers(make_recipe, monkeypatch, schedule):
    """As on a device: nothing is posted ahead, and neighbours are started together by torch's batched calls."""
    wanted = runs.reference(runs.recipe(make_recipe, 1))
    started = []
    plain = transport.Transport.__init__

    def ordered(self, schedule, place, line):
        plain(self, schedule, place, line)
        self._ahead = False
        self._runs = transport._runs(schedule.programs[place], together=True)

    def batched(self, several):
        calls = [
            dist.P2POp(dist.isend if each.away else dist.irecv, each.tensor, group=self.group, group_peer=each.peer)
            for each in several
        ]
        started.append(len(calls))
        works = dist.batch_isend_irecv(calls)
        return [transport.Pending(works)] * len(calls)

    monkeypatch.setattr(transport.Transport, "__init__", ordered)
    monkeypatch.setattr(Channel, "_messages", batched)
    monkeypatch.setattr(Channel, "_message", lambda self, *one: batched(self, [Message(*one)])[0])
    runs.assert_equal(runs.recipe(make_recipe, 2, {"schedule": schedule}), 2, wanted)


def test_a_ledger_counts_what_the_plan_says(make_recipe):
    """Two ranks, untied: each sends one hidden state a microbatch, and neither takes the other's calls for its own."""
    ledger = {"ledger": {}}
    options = {"schedule": "1f1b"}
    model = {"tie_word_embeddings": False}
    counts = Bytes()
    runs.record_ranks(runs.recipe(make_recipe, 2, options, model=model, plugins=ledger), 2, {"bytes": counts})


class Bytes(runs.Plugin):
    """After the last step: activations of this rank's 8 microbatches a step, of 32 tokens by 16 values in fp64."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    @runs.hookimpl
    def bind(self, state):
        before = Channel.observer

        def told(call):
            if call.op == "send" and call.plugin == "pipeline" and call.elements > 12:
                self.sent += call.bytes
            if before is not None:
                before(call)

        Channel.observer = told

    @runs.hookimpl
    def post_step(self, state):
        if state.step == 3:
            assert self.sent == 3 * 8 * 32 * 16 * 8, self.sent


class Wire:
    """A channel that notes what was started, and whose messages are over when they are waited for."""

    def __init__(self):
        self.sent, self.asked, self.waited = {}, {}, 0

    def send(self, tensor, peer, hook):
        self.sent.setdefault(peer, []).append(tensor)
        return self

    def recv(self, tensor, peer, hook):
        self.asked[peer] = self.asked.get(peer, 0) + 1
        return self

    def wait(self):
        self.waited += 1


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipe_v"])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(("elements", "ahead"), [(1, 1 << 18), (1 << 16, 4), (1 << 18, 2)])
def test_messages_leave_when_made_and_receives_are_posted_while_waiting(schedule, place, elements, ahead):
    """In the program's order on each link, never later than there; receives never more ahead of it than a MiB or two of
    them, and nothing before the program comes to the first.
    """
    made, wire = make(schedule, 4, 8), Wire()
    moves = transport.Transport(made, place, transport.Line(wire, torch.device("cpu"), kept=4))
    moves.forms = dict.fromkeys(range(len(made.placement)), Form((elements,), torch.float32, True))
    moves._told = set(moves.forms)
    moves.start_window()
    assert not wire.asked
    sends = {Kind.F: Kind.SEND_F, Kind.B: Kind.SEND_B, Kind.I: Kind.SEND_B}
    contents, sent, reached = {}, {}, {}
    for action in made.programs[place]:
        kind = sends.get(action.kind)
        if kind is not None and (send := Action(kind, *action[1:])) in made.programs[place]:
            contents[send] = torch.tensor([float(len(contents))])
            moves.put(send, contents[send])
            peer = made.peer(place, send)
            link = [each for each in made.programs[place] if each in moves._sends[peer]]
            in_turn = all(each in contents for each in link[: link.index(send)])
            assert any(each is contents[send] for each in wire.sent.get(peer, ())) == in_turn
        elif action.kind in (Kind.SEND_F, Kind.SEND_B):
            moves.run(action)
            peer = made.peer(place, action)
            sent.setdefault(peer, []).append(action)
            assert len(wire.sent[peer]) >= len(sent[peer]) and len(moves.line._sent[peer]) <= 4
        elif action.kind in (Kind.RECV_F, Kind.RECV_B):
            moves.run(action)
            peer = made.peer(place, action)
            reached[peer] = reached.get(peer, 0) + 1
            assert reached[peer] <= wire.asked[peer] <= reached[peer] + ahead
            moves.take(action)
            assert wire.asked[peer] == min(reached[peer] + ahead, len(moves._receives[peer]))
    for peer, actions in sent.items():
        assert all(left is contents[action] for left, action in zip(wire.sent[peer], actions, strict=True))
