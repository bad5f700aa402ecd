"""Without an observer a call costs what its torch calls cost, and one comparison."""

import sys

import torch
import torch.distributed as dist

from camshaft import comm
from camshaft.comm import Call, Channel, Pending, starting
from camshaft.testing.ranks import run_ranks


def functions(call):
    """Names of the Python functions of the core that ``call`` enters, in order."""
    found = []

    def profile(frame, event, _):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("camshaft"):
            found.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def calls(line):
    part, whole = torch.ones(8), torch.ones(8 * line.size)
    parts = list(whole.split(8))
    return {
        "all_reduce": lambda: line.all_reduce(part, "reduce"),
        "reduce_scatter": lambda: line.reduce_scatter(part, whole, "reduce"),
        "all_gather": lambda: line.all_gather(whole, part, "step"),
        "all_to_all": lambda: line.all_to_all(parts, parts[::-1], "reduce"),
        "broadcast": lambda: line.broadcast(part, 0, "bind"),
    }


def entered(rank, world_size):
    line = Channel(dist.group.WORLD, "tester", "dp")
    off, on, told = {}, {}, []
    for name, call in calls(line).items():
        pending = []
        off[name] = functions(lambda call=call, pending=pending: pending.append(call()))
        pending.pop().wait()
        Channel.observer = told.append
        on[name] = functions(lambda call=call, pending=pending: pending.append(call()))
        Channel.observer = None
        pending.pop().wait()
    return off, on, len(told)


def test_nothing_of_the_observer_runs_while_there_is_none():
    for off, on, told in run_ranks(2, entered):
        assert told == len(off) == 5
        for name, functions_entered in off.items():
            assert functions_entered[:2] == [name, f"_{name}"], "the comparison, and the work itself"
            assert "_told" not in functions_entered and "Call" not in str(functions_entered)
            assert "_told" in on[name], "this test would not see the observer either"
            assert len(on[name]) > len(functions_entered)
        assert off["all_reduce"][2] == "_reduce_of_two"
        assert off["broadcast"] == ["broadcast", "_broadcast", "__init__"]


def test_a_pending_call_holds_no_dictionary():
    assert not hasattr(Pending(()), "__dict__")
    assert comm.Channel.observer is None


def nested(rank, world_size):
    line, seen = Channel(dist.group.WORLD, "tester", "dp"), []
    Channel.observer = lambda call: seen.append((call, starting()))
    line.all_reduce(torch.ones(3, dtype=torch.bfloat16), "reduce").wait()

    def refuse(call):
        raise ValueError("refused")

    Channel.observer = refuse
    try:
        line.all_reduce(torch.ones(3), "reduce")
    except ValueError:
        seen.append(starting())
    Channel.observer = None
    return seen


def test_an_observer_is_told_before_the_call_and_may_refuse_it():
    for (call, before), after in run_ranks(2, nested):
        assert call == Call("tester", "reduce", "dp", "all_reduce", torch.bfloat16, 3, 2)
        assert call.bytes == 2 * 1 / 2 * 3 * 2
        assert not before and not after
