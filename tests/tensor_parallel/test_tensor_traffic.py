"""What travels along tp is the theoretical minimum, and no rank ever has full logits."""

from collections import Counter

import pytest
import torch
from tensor_cases import MODEL, recipe
from torch.utils._python_dispatch import TorchDispatchMode

from camshaft.comm import Channel
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import record_rank

ROWS, TOKENS = 4, 128
"""Rows and tokens of a microbatch; sequences of 32."""


class Largest(TorchDispatchMode):
    """Remembers every tensor with at least a vocabulary's numbers for each token of a microbatch."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.found = limit, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, torch.Tensor) and each.is_floating_point() and each.numel() >= self.limit:
                self.found.append((str(function), tuple(each.shape)))
        return made


class Watch(Plugin):
    def __init__(self, limit):
        super().__init__()
        self.limit, self.mode = limit, None

    @hookimpl
    def pre_run(self):
        self.mode = Largest(self.limit)
        self.mode.__enter__()

    @hookimpl
    def close(self):
        if self.mode is not None:
            self.mode.__exit__(None, None, None)


def watched(rank, world_size, resolved, limit):
    watch = Watch(limit)
    record_rank(rank, world_size, resolved, {"watch": watch})
    return watch.mode.found


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
def test_no_rank_ever_has_full_logits(make_recipe, sequence):
    resolved = recipe(make_recipe, 2, tensor={"sequence_parallel": sequence}, compute="fp32")
    limit = TOKENS * MODEL["vocab_size"]
    for found in run_ranks(2, watched, resolved, limit, timeout_s=100):
        assert found == []


def test_the_watch_sees_full_logits(make_recipe):
    """On one rank they are there; so the check can fail."""
    resolved = recipe(make_recipe, 1, compute="fp32")
    (found,) = run_ranks(1, watched, resolved, TOKENS * MODEL["vocab_size"], timeout_s=100)
    assert any(shape[-1] == MODEL["vocab_size"] for _, shape in found)


def counted(rank, world_size, resolved):
    calls = []
    Channel.observer = calls.append
    steps = len(record_rank(rank, world_size, resolved))
    Channel.observer = None
    return steps, [call for call in calls if call.plugin == "tensor_parallel"]


def exchanged(make_recipe, degree, **tensor):
    """Of each rank: (operation, elements of the whole) to how often in a microbatch; bytes sent in a microbatch."""
    resolved = recipe(make_recipe, degree, tensor=tensor, compute="fp32")
    for steps, calls in run_ranks(degree, counted, resolved, timeout_s=100):
        windows = steps * 3
        numbers = Counter((call.op, call.elements) for call in calls if call.hook != "reduce_parts")
        assert all(count % windows == 0 for count in numbers.values()), "alike in every microbatch"
        assert {call.axis for call in calls} == {"tp"}
        sent = sum(call.bytes for call in calls if call.hook != "reduce_parts")
        sums = Counter(call.elements for call in calls if call.hook == "reduce_parts")
        yield {key: count // windows for key, count in numbers.items()}, sent / windows, sums, steps


LAYERS, HIDDEN = MODEL["num_hidden_layers"], MODEL["hidden_size"]
LOSS = {("all_reduce", TOKENS): 1, ("all_reduce", 2 * TOKENS): 1}
"""The largest logit of each token; the sum of the exponentials and the label's own."""


def least(degree):
    """Bytes of four sums a layer, one out of the embedding, one into the head, and three numbers a token."""
    return 2 * (degree - 1) / degree * TOKENS * ((4 * LAYERS + 2) * HIDDEN + 3) * 4


@pytest.mark.parametrize("degree", [2, 4])
def test_four_sums_a_layer(make_recipe, degree):
    for numbers, sent, sums, steps in exchanged(make_recipe, degree):
        assert numbers == {("all_reduce", TOKENS * HIDDEN): 4 * LAYERS + 2, **LOSS}
        assert sent == pytest.approx(least(degree), rel=1e-12)
        keys = 2 * HIDDEN // 4 * HIDDEN * LAYERS  # what two ranks share of keys and values, where there are four
        assert sums == ({} if degree == 2 else {keys: steps})


@pytest.mark.parametrize("degree", [2, 4])
def test_or_the_same_bytes_as_gathers_and_scatters(make_recipe, degree):
    for numbers, sent, sums, steps in exchanged(make_recipe, degree, sequence_parallel=True):
        passages = 4 * LAYERS + 2
        assert numbers == {
            ("all_gather", TOKENS * HIDDEN): passages,
            ("reduce_scatter", TOKENS * HIDDEN): passages,
            **LOSS,
        }
        assert sent == pytest.approx(least(degree), rel=1e-12)
        norms = (2 * LAYERS + 1) * HIDDEN
        assert sums[norms] == steps, "the norms' gradients once a step, all of them together"


def test_overlap_sends_the_same_bytes(make_recipe):
    """One message to each rank, not a gather or a scatter; but for the embedding, and each region's first window."""
    for degree in (2, 4):
        for steps, calls in run_ranks(degree, counted, overlapping(make_recipe, degree), timeout_s=100):
            sent = sum(call.bytes for call in calls if call.hook != "reduce_parts")
            assert sent == pytest.approx(least(degree) * steps * 3, rel=1e-12)
            ops = Counter(call.op for call in calls)
            passages, regions = (4 * LAYERS + 2) * 2, 2 * LAYERS
            whole = steps * 3 * 2 + 3 * regions * 2
            assert ops["all_gather"] + ops["reduce_scatter"] == whole
            assert ops["all_to_all"] == (passages * steps * 3 - whole) * (degree - 1)


def overlapping(make_recipe, degree):
    return recipe(make_recipe, degree, tensor={"sequence_parallel": True, "async": True}, compute="fp32")
