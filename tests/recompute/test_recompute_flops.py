"""Operations that attention costs, counted by hand and by torch's own formula where that has one."""

import pytest
import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from camshaft_recompute.watching import _attention, _flops


@pytest.mark.parametrize("keys", [4, 2, 1])
def test_attention_costs_both_products_of_every_query_head(keys):
    q, k, v = torch.Size((3, 4, 5, 8)), torch.Size((3, keys, 7, 8)), torch.Size((3, keys, 7, 6))
    assert _attention(q, k, v) == 3 * 4 * (2 * 5 * 7 * 8 + 2 * 5 * 7 * 6)
    if keys == 4:
        assert _attention(q, k, v) == sdpa_flop_count(q, k, v)


@pytest.mark.parametrize(
    "kernel", ["flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"]
)
def test_every_devices_attention_is_counted_with_shared_keys(kernel, monkeypatch):
    """torch 2.11 counts those of a GPU, and fails where query heads share key heads."""
    operation = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default

    def refuses(*_, **__):
        raise AssertionError("sdpa_flop_count: query/key/value shapes are incompatible")

    monkeypatch.setitem(flop_registry, operation.overloadpacket, refuses)
    q, k, v = (torch.empty(3, heads, 5, 8, device="meta") for heads in (4, 2, 2))
    assert _flops(operation, (q, k, v), {}, None) == 3 * 4 * 2 * (2 * 5 * 5 * 8)
