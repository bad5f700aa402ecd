"""Flat buffers: every stretch is a multiple of the alignment, and as large as the plan says."""

import pytest
import torch
from torch.nn import Parameter

from camshaft_zero.grouping import ALIGNMENT, Group, Item
from camshaft_zero.layout import Layout

SIZES = {
    "empty": [0],
    "one": [1],
    "aligned": [16, 32],
    "odd": [7, 21, 16, 1],
    "just over": [64, 33],
}


@pytest.mark.parametrize("divisor", [1, 2, 3, 8])
@pytest.mark.parametrize("name", SIZES)
def test_stretches_are_aligned_and_as_large_as_planned(name, divisor):
    items = [Item(f"p{number}", size, (f"p{number}",)) for number, size in enumerate(SIZES[name])]
    roles = ("matrix", "bias", "norm", "matrix")
    named = [(item.name, Parameter(torch.empty(item.elements)), role) for item, role in zip(items, roles, strict=False)]
    layout = Layout(named, divisor)
    assert ALIGNMENT == 16
    assert layout.size == Group("group", items).padded(divisor)
    stretch, rest = divmod(layout.size, divisor)
    assert rest == 0 and stretch % 16 == 0 and stretch > 0
    needed = sum(-(-item.elements // 16) * 16 for item in items)
    assert max(needed, 1) <= layout.size < max(needed, 1) + 16 * divisor, "no more padding than that takes"
    assert all(member.place % 16 == 0 for member in layout.members)
