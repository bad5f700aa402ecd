"""Bubbles and peak activations of the shipped schedules against what their papers say."""

from __future__ import annotations

import pytest

from camshaft_pipeline.orders_v import dualpipe_v
from camshaft_pipeline.replay import B, F, I, Times, W
from camshaft_pipeline.schedules import make
from camshaft_pipeline.simulator import simulate


def windows(p):
    """Numbers of microbatches from p to 8 p: both ends, and ones that p does not divide; fewer where p is large."""
    if p <= 6:
        return sorted({*range(p, 8 * p + 1, max(1, p // 2)), 2 * p + 1, 8 * p})
    if p in (8, 12, 16, 32):
        return [p, 3 * p - 1, 8 * p]
    return [p, 2 * p + 1]


RANKS = range(2, 33)
ANY = (Times(3, 2, 1), Times(1, 1, 1), Times(2, 3, 5))


def timing(name, p, m, times, v=None):
    return simulate(make(name, p, m, v), times)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("p", RANKS)
def test_one_stage_a_rank_wastes_p_minus_1_of_m(name, p):
    for m in windows(p):
        times = ANY[(p + m) % 3]
        timeline = timing(name, p, m, times)
        one = times.forward + times.inputs + times.weights
        assert timeline.ideal == m * one
        assert timeline.idle == (p - 1) * one  # (p - 1) / m of the ideal
        assert timeline.peak == tuple(m if name == "gpipe" else p - rank for rank in range(p))


@pytest.mark.parametrize("p", RANKS)
def test_interleaving_divides_the_bubble_by_the_virtual_stages(p):
    for m in windows(p):
        v = 2 + (p + m) % 2
        times = ANY[(p + m) % 3]
        timeline = timing("interleaved_1f1b", p, m, times, v)
        one = times.forward + times.inputs + times.weights  # of one stage: 1/v of what a rank holds
        assert timeline.ideal == v * m * one
        assert timeline.idle == (p - 1) * one  # (p - 1) / (v m) of the ideal
        if m % p == 0:  # Megatron's own warm-up: 2 (p - r - 1) + (v - 1) p forwards ahead, and one more
            assert timeline.peak == tuple(min(2 * (p - rank - 1) + (v - 1) * p + 1, v * m) for rank in range(p))


@pytest.mark.parametrize(("p", "v"), [(2, 3), (4, 2), (8, 4)])
def test_breadth_first_has_the_bubble_of_interleaving_and_holds_everything(p, v):
    timeline = timing("gpipe", p, 2 * p, Times(3, 2, 1), v)
    assert timeline.idle == (p - 1) * 6 and timeline.ideal == v * 2 * p * 6
    assert timeline.peak == (v * 2 * p,) * p


@pytest.mark.parametrize("p", RANKS)
def test_zb_h1_wastes_f_plus_i_minus_w_for_each_rank_but_one(p):
    """arXiv:2401.10241, table 2, writes (p - 1) (T_F + T_B - T_W), where T_B is what is I here."""
    for m in windows(p):
        for times in (Times(1, 1, 1),) if m > p else (Times(1, 1, 1), Times(3, 2, 1), Times(10, 12, 9)):
            timeline = timing("zb_h1", p, m, times)
            assert timeline.idle == timeline.stretch - timeline.ideal
            assert timeline.idle == (p - 1) * (times.forward + times.inputs - times.weights)
            assert timeline.peak == (p,) * p  # as 1F1B's first rank


def test_zb_h1_has_a_third_of_1f1bs_bubble_where_all_parts_take_the_same():
    assert 3 * timing("zb_h1", 8, 32, Times()).idle == timing("1f1b", 8, 32, Times()).idle == 21


@pytest.mark.parametrize("p", RANKS)
def test_zbv_has_no_bubble_where_all_parts_take_the_same(p):
    for m in windows(p):
        if m < 2 * p - 1:
            continue  # too few microbatches to fill the V; the bound on activations is checked elsewhere
        timeline = timing("zbv", p, m, Times())
        assert timeline.stretch == timeline.ideal == 6 * m  # the papers' cost: every rank works without a gap
        assert timeline.idle == p - 1  # and only its start is late, by one forward of half a stage a rank
        assert timeline.peak == (2 * p,) * p  # halves of a stage: 1F1B's p whole ones


@pytest.mark.parametrize("p", RANKS)
def test_dualpipe_v_holds_one_activation_more_and_wastes_as_little_as_zb_h1(p):
    for m in windows(p):
        if m < 2 * p:
            continue
        for times in (Times(1, 1, 1), Times(3, 2, 1))[m > 3 * p :]:
            timeline = timing("dualpipe_v", p, m, times)
            assert timeline.idle == (p - 1) * (times.forward + times.inputs - times.weights)
            assert timeline.peak == (2 * p + 1,) * p  # its repository's table: stages + 1


def pairs(rank, p, m):
    """DualPipeV's order with F and the B behind it as one; the last rank's first pair is not one, as published."""
    order, units = dualpipe_v(rank, p, m, 2), []
    apart = 1 if rank == p - 1 else 0
    while order:
        both = len(order) > 1 and order[0].kind is F and order[1].kind is B
        if both and apart:
            apart, both = 0, False
        units.append(order[: 1 + both])
        del order[: 1 + both]
    return units


def run_pairs(p, m, forward, inputs, weights, pair):
    """Idle time of each rank where a pair takes ``pair``, needs all its data first and gives all results at its end."""
    takes = {F: forward, B: inputs + weights, I: inputs, W: weights}
    todo, now, done, work = [pairs(rank, p, m) for rank in range(p)], [0] * p, {}, [0] * p

    def needs(action):
        step = -1 if action.kind is F else 1
        there = action.kind is not W and 0 <= action.stage + step < 2 * p
        return [(action.kind is F, action.microbatch, action.stage + step)] if there else []

    moved = True
    while moved:
        moved = False
        for rank in range(p):
            while todo[rank] and all(need in done for action in todo[rank][0] for need in needs(action)):
                unit, moved = todo[rank].pop(0), True
                cost = pair if len(unit) == 2 else takes[unit[0].kind]
                now[rank] = max([now[rank], *(done[need] for action in unit for need in needs(action))]) + cost
                work[rank] += cost
                done |= {(a.kind is F, a.microbatch, a.stage): now[rank] for a in unit if a.kind is not W}
    assert not any(todo)
    return [max(now) - busy for busy in work]


@pytest.mark.parametrize("p", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(("f", "w", "saved"), [(1, 1, 0), (2, 1, 0), (2, 1, 0.5), (2, 2, 1), (4, 3, 3)])
def test_dualpipe_v_with_pairs_as_one_has_the_bubble_of_its_repositorys_table(p, f, w, saved):
    """(PP/2 - 1) (F&B + B - 3W) with PP = 2 p stages; for F = I, on the rank that has no pair apart from it."""
    full = f + w
    together = f + full - saved
    for m in (2 * p, 3 * p):
        idle = run_pairs(p, m, f, f, w, together)
        assert max(idle) == (p - 1) * (together + full - 3 * w)
        assert saved or len(set(idle)) == 1
