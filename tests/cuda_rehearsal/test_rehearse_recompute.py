"""What selective recomputation meets in a graph for a GPU, where kernels of Triton's are nodes: a stand-in for one."""

import pytest
import torch

from camshaft_recompute.kinds import KINDS, exchanges, makes, name_of, of_kinds, shares, writes


@pytest.mark.parametrize("name", ["triton_kernel_wrapper_mutation", "triton_kernel_wrapper_functional"])
def test_a_launch_of_a_kernel_is_made_again(name):
    """It has no schema and no overloads: nobody can tell what it writes, so its result is never kept."""
    pytest.importorskip("torch._higher_order_ops.triton_kernel_wrap")
    operation = getattr(torch.ops.higher_order, name)
    assert name_of(operation) == f"higher_order.{name}"
    assert writes(operation) and not (makes(operation) or shares(operation) or exchanges(operation))
    assert not of_kinds([*KINDS, "higher_order.*", "*"])(operation)
    assert of_kinds(["products"])(torch.ops.aten.mm.default)
