"""Global norm and clipping: plain, laid out, uneven, empty, non-finite."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from camshaft.comm import Channel
from camshaft.parts import Box, Part, Parts, Piece
from camshaft.testing.ranks import run_ranks
from camshaft_clip.norm import Clipper


def parameters(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return made


def parts_of(made):
    return Parts(
        Part(p, "matrix", (Piece(str(index), tuple(p.shape), 0, 0, p.numel()),)) for index, p in enumerate(made)
    )


def clip_(made, max_norm):
    device = made[0].device if made else torch.device("cpu")
    return Clipper(parts_of(made), max_norm, master=torch.float32, device=device)()


def global_norm(made):
    return clip_(made, None)


def flat(made):
    return torch.cat([parameter.grad.reshape(-1) for parameter in made])


@pytest.mark.parametrize("max_norm", [0.1, 1e3, None])
def test_equals_the_definition_and_torch(max_norm):
    made, other = parameters((7, 15), (3,), (0,), (1, 1)), parameters((7, 15), (3,), (0,), (1, 1))
    before = flat(made).clone()
    norm = clip_(made, max_norm)
    torch.testing.assert_close(norm, before.norm(), rtol=1e-14, atol=0)
    if max_norm is not None:
        nn.utils.clip_grad_norm_(other, max_norm)
    torch.testing.assert_close(flat(made), flat(other), rtol=1e-14, atol=0)


def test_gradients_within_the_limit_keep_every_bit_and_nan_still_spreads():
    made = parameters((7, 15), (3,), dtype=torch.float32)
    before = flat(made).clone()
    clip_(made, 1e3)
    assert torch.equal(flat(made), before)
    made[0].grad[0, 0] = float("nan")
    clip_(made, 1e3)
    assert torch.isnan(flat(made)).all(), "as torch does: nothing that looks finite is left behind"


def test_parameters_without_a_gradient_are_left_out():
    made = parameters((3,), (4,))
    made[0].grad = None
    norm = clip_(made, 1.0)
    assert made[0].grad is None and float(norm) > 0
    made[1].grad = None
    assert float(clip_(made, 1.0)) == 0.0


def test_without_any_gradient_the_norm_is_zero_where_the_parameters_are():
    norm = clip_([nn.Parameter(torch.zeros(3, device="meta"))], 1.0)
    assert norm.device.type == "meta" and norm.shape == ()
    assert float(clip_([], 1.0)) == 0.0


def test_a_norm_near_zero_does_not_blow_gradients_up():
    made = parameters((3,))
    made[0].grad.zero_()
    clip_(made, 1e-12)
    assert torch.equal(made[0].grad, torch.zeros(3, dtype=torch.float64))


def test_low_precision_gradients_get_a_wide_norm():
    made = [nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))]
    made[0].grad = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    norm = clip_(made, None)
    assert norm.dtype == torch.float32 and float(norm) == 64.0


def test_mixed_dtypes_count_together():
    made = [*parameters((3,), dtype=torch.float32), *parameters((5,), dtype=torch.float64)]
    torch.testing.assert_close(
        clip_(made, None).double(), torch.cat([p.grad.double() for p in made]).norm(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_norm_is_returned_as_it_is(bad):
    made = parameters((3,), (4,))
    made[0].grad[1] = bad
    assert not torch.isfinite(clip_(made, 1.0))


def laid_out(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    made = parameters((7, 15), (3,), (5, 2), (4,))
    whole = flat(made).norm()
    layouts = [(Shard(0), Replicate()), (Replicate(), Replicate()), (Shard(0), Shard(1)), None]
    held = []
    for parameter, placements in zip(made, layouts, strict=True):
        if placements is None:
            held.append(parameter)
            continue
        laid = nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements))
        laid.grad = distribute_tensor(parameter.grad, mesh, placements)
        held.append(laid)
    norm = global_norm(held)
    clip_(held, 0.5)
    after = global_norm(held)
    return float(norm), float(whole), float(after)


def test_each_parameter_counts_once_whatever_axes_it_is_laid_out_on():
    for norm, whole, after in run_ranks(4, laid_out):
        assert norm == pytest.approx(whole, rel=1e-13)
        assert after == pytest.approx(0.5, rel=1e-5)


def partial(rank, world_size):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    gradient = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with pytest.raises(ValueError, match="still partial: it was not reduced before the norm"):
        parameter = nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Partial()]))
        parameter.grad = gradient
        global_norm([parameter])
    return True


def test_a_gradient_that_was_never_reduced_is_refused():
    assert run_ranks(2, partial) == [True, True]


WHOLE = {"a": (4, 6), "b": (5,), "c": (3, 2)}


def gradient_of(name):
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    return torch.randn(WHOLE[name], generator=generator, dtype=torch.float64).to(torch.float32)


def copied(rank, world_size):
    """Ranks 0 and 1: halves of ``a`` and copies of ``b`` in one flat tensor with padding; 2: ``c``; 3: nothing."""
    channel = Channel(torch.distributed.group.WORLD, "core", "pp+tp")
    held = []
    if rank < 2:
        half = Piece("a", (4, 3), 0, 0, 12, Box((4, 6), (0, 3 * rank)))
        flat = torch.zeros(32)
        flat[:12] = gradient_of("a")[:, 3 * rank : 3 * rank + 3].reshape(-1)
        flat[16:21] = gradient_of("b")
        pieces = (half, Piece("b", (5,), 0, 16, 5, Box((5,), (0,), copies=2)))
        held.append(Part(nn.Parameter(torch.zeros(32)), "matrix", pieces))
        held[0].tensor.grad = flat
    elif rank == 2:
        whole = nn.Parameter(torch.zeros(3, 2))
        whole.grad = gradient_of("c")
        held.append(Part(whole, "matrix", (Piece("c", (3, 2), 0, 0, 6),)))
    parts = Parts(held)
    parts.everyone = channel
    clipper = Clipper(parts, 0.25, master=torch.float32, device=torch.device("cpu"))
    before = clipper.norm()
    parts.isolate(["a"])
    split = clipper()
    after = clipper.norm()
    return before, split, after, sum(float(tensor.grad[tensor.grad != 0].numel()) for tensor in parts.tensors)


def test_copies_count_once_and_all_ranks_get_the_same_bits():
    whole = torch.cat([gradient_of(name).reshape(-1).double() for name in WHOLE]).norm()
    reports = run_ranks(4, copied)
    for before, split, after, _ in reports:
        assert before.dtype == torch.float32
        assert torch.equal(before, reports[3][0]) and torch.equal(split, before) and torch.equal(after, reports[3][2])
        assert float(before) == pytest.approx(float(whole), rel=1e-7)
        assert float(after) == pytest.approx(0.25, rel=1e-5)
    assert [count for *_, count in reports] == [17, 17, 6, 0]
