"""Global norm and clipping: plain, laid out, uneven, empty, non-finite."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from camshaft.parts import Part, Parts, Piece
from camshaft.testing.ranks import run_ranks
from camshaft_clip import norm as clipping


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
    return clipping.clip_(parts_of(made), max_norm)


def global_norm(gradients):
    return clipping.global_norm(gradients, parts_of([]))


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
    norm = global_norm([parameter.grad for parameter in held])
    clip_(held, 0.5)
    after = global_norm([parameter.grad for parameter in held])
    return float(norm), float(whole), float(after)


def test_each_parameter_counts_once_whatever_axes_it_is_laid_out_on():
    for norm, whole, after in run_ranks(4, laid_out):
        assert norm == pytest.approx(whole, rel=1e-13)
        assert after == pytest.approx(0.5, rel=1e-5)


def partial(rank, world_size):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    gradient = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with pytest.raises(ValueError, match="still partial: it was not reduced before the norm"):
        global_norm([gradient])
    return True


def test_a_gradient_that_was_never_reduced_is_refused():
    assert run_ranks(2, partial) == [True, True]
