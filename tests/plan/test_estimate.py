"""Bytes by arithmetic: the paper's row, uneven sizes, answers of several plugins."""

import pytest

from camshaft.claims import Widths
from camshaft.errors import PluginError
from camshaft.estimate import Estimate, Sent, Sizes, StateBytes, combine, replicated, state_bytes

MIXED = Widths(param=2, gradient=2, reduce=2, master=4)


@pytest.mark.parametrize(
    ("shards", "gigabytes", "formula"),
    [
        ({}, 120, lambda p, n: (2 + 2 + 12) * p),
        ({"optimizer": 64}, 31.4, lambda p, n: 4 * p + 12 * p / n),
        ({"optimizer": 64, "gradients": 64}, 16.6, lambda p, n: 2 * p + 14 * p / n),
        ({"optimizer": 64, "gradients": 64, "parameters": 64}, 1.9, lambda p, n: 16 * p / n),
    ],
)
def test_the_papers_row_of_7_5_billion_parameters_on_64_ranks(shards, gigabytes, formula):
    """Rajbhandari et al., figure 1: mixed precision, Adam, K = 12."""
    found = state_bytes(7_500_000_000, MIXED, 2, **shards).total
    assert found == formula(7_500_000_000, 64)
    assert round(found / 1e9, 1) == gigabytes


def test_a_share_is_rounded_up_to_whole_elements():
    assert state_bytes(10, MIXED, 2, parameters=3, gradients=4, optimizer=64) == StateBytes(8, 6, 4, 8)


def test_frozen_elements_have_neither_gradients_nor_optimizer_state():
    assert state_bytes(10, Widths(), 2, trained=4) == StateBytes(40, 16, 0, 32)
    assert state_bytes(10, MIXED, 2, trained=4, parameters=2) == StateBytes(10, 8, 16, 32)
    assert state_bytes(10, MIXED, 2, trained=0).total == 20


def test_wide_parameters_are_their_own_masters():
    assert Widths().master_copy == 0 and MIXED.master_copy == 4
    assert Widths(8, 8, 8, 8).master_copy == 0
    assert state_bytes(10, Widths(8, 8, 8, 8), 1).total == 10 * 24


def test_an_optimizer_that_does_not_say_what_it_keeps_leaves_it_open():
    found = state_bytes(10, Widths(), None)
    assert found.moments is None and found.total == 80


def sizes(widths=MIXED, trained=10):
    return Sizes(elements=10, trained=trained, accumulation=1, widths=widths, moments=2, parameters=None)


def test_gradients_are_widened_for_masters_only_where_they_are_narrower():
    assert sum(size for _, size in replicated(sizes(trained=6)).buffers) == 24
    assert replicated(sizes(Widths(2, 4, 4, 4))).buffers == ()
    assert replicated(sizes(Widths())).buffers == ()


def test_without_answers_every_rank_has_everything():
    assert combine({}, sizes()) == combine({"quiet": None}, sizes()) == replicated(sizes())


def test_buffers_and_traffic_of_all_plugins_add_up_beside_one_state():
    own = Estimate(state_bytes(10, MIXED, 2, optimizer=2), buffers=(("a", 1),), sent=(Sent("dp", "all_gather", 5),))
    other = Estimate(buffers=(("b", 2),), sent=(Sent("tp", "all_reduce", 7),), notes=("dear",))
    found = combine({"storage": own, "tensor": other}, sizes())
    assert found.state == own.state and found.buffers == (("a", 1), ("b", 2)) and found.notes == ("dear",)
    assert found.sent == (Sent("dp", "all_gather", 5), Sent("tp", "all_reduce", 7))
    alone = combine({"tensor": other}, sizes())
    assert alone.state == replicated(sizes()).state and alone.buffers[-1] == ("b", 2) and len(alone.buffers) == 2


def test_only_one_plugin_tells_the_model_state():
    state = Estimate(state_bytes(10, MIXED, 2))
    with pytest.raises(PluginError, match="plugin 'two', hook 'estimate': tells the model state, and 'one' does too"):
        combine({"one": state, "quiet": None, "two": state}, sizes())
