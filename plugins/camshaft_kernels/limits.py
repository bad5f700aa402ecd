"""Whether an implementation can be used in a world: device, packages, dtype, the GPU's age, sizes."""

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
    lack = offer.lack(world.device.type)
    if lack is not None:
        return lack[0]
    dtype = dtype_of(offer.op, world)
    if dtype not in offer.dtypes:
        return f"it takes {', '.join(sorted(offer.dtypes))}, and {offer.op} gets {dtype} here"
    if not offer.compiles and COMPILER in world.recipe.plugins:
        return f"'{COMPILER}' would trace it anew for every batch"
    return _on_gpu(offer, world) if offer.devices == {"cuda"} else None


def _on_gpu(offer: Offer, world: World) -> str | None:
    if offer.provider == "triton":
        from camshaft_kernels.triton import available

        return available()
    if offer.capability > (found := torch.cuda.get_device_capability(world.device)):
        return "it needs compute capability {}.{}, and this GPU has {}.{}".format(*offer.capability, *found)
    width = resolve(world.recipe.model, world.recipe.model.vocab_size or 1).head_dim
    if offer.widest_head is not None and width > offer.widest_head:
        return f"it takes heads of at most {offer.widest_head}, and these have {width}"
    return None
