"""Whether an implementation can be used: device, packages, dtype, the GPU's age, sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from camshaft.models.config import resolve
from camshaft_kernels.offers import Offer
from camshaft_kernels.registry import COMPILER
from camshaft_kernels.sizes import dtype_of

if TYPE_CHECKING:
    from camshaft.state import World


def missing(offer: Offer, world: World) -> str | None:
    """Why ``offer`` cannot be used in ``world``, in one sentence; None: it can."""
    model = world.recipe.model
    width = resolve(model, model.vocab_size or 1).head_dim
    reason = unusable(offer, world.device, dtype_of(offer.op, world), width)
    if reason is None and not offer.compiles and COMPILER in world.recipe.plugins:
        return f"'{COMPILER}' would trace it anew for every batch"
    return reason


def unusable(offer: Offer, device: torch.device, dtype: str, head: int) -> str | None:
    """Why ``offer`` cannot be used on ``device`` for ``dtype``, with heads of width ``head``; None: it can."""
    lack = offer.lack(device.type)
    if lack is not None:
        return lack[0]
    if dtype not in offer.dtypes:
        return f"it takes {', '.join(sorted(offer.dtypes))}, and {offer.op} gets {dtype} here"
    if offer.widest_head is not None and head > offer.widest_head:
        return f"it takes heads of at most {offer.widest_head}, and these have {head}"
    if offer.provider == "triton":
        from camshaft_kernels.triton import available

        return available(device)
    if device.type == "cuda" and offer.capability > (found := torch.cuda.get_device_capability(device)):
        return "it needs compute capability {}.{}, and this GPU has {}.{}".format(*offer.capability, *found)
    return None
