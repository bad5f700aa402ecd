"""Where an implementation cannot be used, said in one sentence that ``auto`` and a recipe's author read."""

import pytest
import torch

from camshaft_kernels.limits import unusable
from camshaft_kernels.offers import AMPERE, ANYWHERE, HALF, Offer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("limits", "device", "dtype", "head", "reason"),
    [
        ({}, CPU, "bf16", 64, "'torch' needs a GPU, and this run is on a CPU"),
        ({"devices": ANYWHERE}, CPU, "fp64", 64, "it takes bf16, fp16, fp32, and swiglu gets fp64 here"),
        ({"dtypes": HALF}, CUDA, "fp32", 64, "it takes bf16, fp16, and swiglu gets fp32 here"),
        ({"widest_head": 128}, CUDA, "bf16", 129, "it takes heads of at most 128, and these have 129"),
        ({"widest_head": 128}, CUDA, "bf16", 128, None),
        ({"capability": AMPERE}, CUDA, "bf16", 64, "it needs compute capability 8.0, and this GPU has 7.5"),
        ({"capability": (7, 5)}, CUDA, "bf16", 64, None),
        ({"devices": ANYWHERE, "capability": AMPERE}, CPU, "bf16", 64, None),
    ],
)
def test_each_limit_has_its_reason(limits, device, dtype, head, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert unusable(Offer("swiglu", "torch", "torch:own", **limits), device, dtype, head) == reason
