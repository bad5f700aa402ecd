"""Offsets beyond 2^31 elements: views of memory that is reserved and, but for what is looked at, never touched."""

import pytest
import torch
from triton_cases import DEVICE, compare, labels_of, randn

from camshaft import ops

TRITON = "interpreted"
FAR = (1 << 30) + 64
"""Of which the second is still within 32 bits, the third is not, and the stride itself is: so it is passed in 32."""


def far(*shape, stride, seed=0):
    """bf16 of ``shape`` whose elements are ``FAR`` apart along the dimension ``stride``."""
    steps = list(torch.empty(shape, device="meta").stride())
    steps[stride] = FAR
    memory = torch.empty(FAR * (shape[stride] - 1) + torch.Size(shape).numel(), dtype=torch.bfloat16, device=DEVICE)
    view = memory.as_strided(shape, steps)
    view.copy_(randn(*shape, dtype=torch.bfloat16, seed=seed).detach())
    return view.requires_grad_()


def test_rows_of_a_norm():
    from camshaft_kernels.triton import norm

    compare(
        lambda hidden, weight: norm.rms_norm(hidden, weight, 1e-5),
        lambda hidden, weight: ops.rms_norm(hidden, weight, 1e-5),
        far(3, 40, stride=0), randn(40, dtype=torch.bfloat16),
    )  # fmt: skip


def test_rows_of_gates():
    from camshaft_kernels.triton import swiglu

    compare(swiglu.swiglu, ops.swiglu, far(3, 40, stride=0), far(3, 40, stride=0, seed=1))


@pytest.mark.parametrize("stride", [0, 1, 2])
def test_rows_tokens_and_heads(stride):
    from camshaft_kernels.triton import rope

    turn = torch.rand(3, 3, 1, 4, device=DEVICE)
    angles = torch.cat((turn.cos(), turn.cos()), -1), torch.cat((-turn.sin(), turn.sin()), -1)
    q, k = far(3, 3, 3, 8, stride=stride), far(3, 3, 3, 8, stride=stride, seed=1)
    compare(rope.rope, ops.rope, q, k, angles, torch.bfloat16)


def test_rows_of_logits():
    from camshaft_kernels.triton import loss

    compare(loss.cross_entropy, ops.cross_entropy, far(3, 50, stride=0), labels_of(3, vocabulary=50))
