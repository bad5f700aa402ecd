"""Operations that attention costs, counted by hand and by torch's own formula where that has one."""

import pytest
import torch
from torch.utils.flop_counter import sdpa_flop_count

from camshaft_recompute.watching import _attention


@pytest.mark.parametrize("keys", [4, 2, 1])
def test_attention_costs_both_products_of_every_query_head(keys):
    q, k, v = torch.Size((3, 4, 5, 8)), torch.Size((3, keys, 7, 8)), torch.Size((3, keys, 7, 6))
    assert _attention(q, k, v) == 3 * 4 * (2 * 5 * 7 * 8 + 2 * 5 * 7 * 6)
    if keys == 4:
        assert _attention(q, k, v) == sdpa_flop_count(q, k, v)
