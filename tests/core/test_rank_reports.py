"""What ranks of tests report arrives as it was."""

import pickle

import pytest
import torch
from torch import Tensor

from camshaft.testing import reports
from camshaft.testing.ranks import RankFailed, run_ranks

WHOLE = torch.arange(12.0).view(3, 4)
PLAIN = {
    "fp64": torch.tensor([0.1, -0.0, float("nan"), float("inf")], dtype=torch.float64),
    "bf16": torch.randn(3, 5, dtype=torch.bfloat16),
    "fp8": torch.randn(7).to(torch.float8_e4m3fn),
    "one number": torch.tensor(-0.0),
    "bool": torch.tensor([True, False]),
    "int64": torch.tensor([2**62, -1]),
    "complex": torch.tensor([1 + 2j]),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "empty": torch.empty(0, 3, dtype=torch.int8),
    "columns": WHOLE.t(),
    "part of another": WHOLE[1:, 2],
    "expanded": torch.ones(1, 2).expand(4, 2),
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("name", PLAIN)
def test_a_tensor_keeps_dtype_shape_and_every_bit(name: str) -> None:
    sent = PLAIN[name]
    (came,) = run_ranks(1, lambda rank, size: {"value": [sent]}, timeout_s=60)
    (value,) = came["value"]
    assert type(value) is Tensor and value.dtype == sent.dtype and value.shape == sent.shape
    assert torch.equal(bits(value), bits(sent))
    if value.numel():
        value.zero_()  # it is writable
        assert not bits(value).count_nonzero()


def test_what_is_more_than_its_numbers_stays_so() -> None:
    parameter, leaf = torch.nn.Parameter(torch.ones(3)), torch.ones(2, requires_grad=True)
    came = pickle.loads(reports.dumps([parameter, leaf, parameter, None, "text"]))
    assert type(came[0]) is torch.nn.Parameter and came[1].requires_grad
    assert came[2] is came[0] and came[3:] == [None, "text"]


def test_one_tensor_in_two_places_is_one() -> None:
    tensor = torch.ones(3)
    first, second = pickle.loads(reports.dumps((tensor, {"again": tensor})))
    assert second["again"] is first


def test_a_small_report_of_a_large_tensor_is_small() -> None:
    assert len(reports.dumps(torch.zeros(1 << 20)[:4])) < 1000


def test_what_ranks_say_alike_is_one_object_and_what_differs_is_not() -> None:
    def report(rank: int, size: int) -> dict[str, Tensor]:
        return {"value": torch.full((1 << 16,), float(rank == 1))}

    first, second, third = run_ranks(3, report, timeout_s=60)
    assert first is third and first is not second
    assert (float(first["value"].sum()), float(second["value"].sum())) == (0.0, float(1 << 16))


def test_a_fault_is_told_of_every_rank_that_has_it() -> None:
    def fails(rank: int, size: int) -> None:
        raise ValueError("on purpose")

    with pytest.raises(RankFailed) as caught:
        run_ranks(2, fails, timeout_s=60)
    assert "rank 0: Traceback" in str(caught.value) and "rank 1: Traceback" in str(caught.value)
