"""From an option and a device to dtypes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from camshaft.state import Policy, World
from camshaft_precision.rules import computes

if TYPE_CHECKING:
    from torch import Tensor

    from camshaft.data.loader import Batch
    from camshaft.hookspecs import Forward
    from camshaft_precision import Options


DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def policy(options: Options, device: torch.device) -> Policy:
    """The dtypes that legal ``options`` mean on ``device``."""
    compute = computes(options)
    if compute == "auto":
        compute = "bf16" if fast_bf16(device) else "fp32"
    wide = torch.float64 if compute == "fp64" else torch.float32
    return Policy(
        param=_dtype(options.parameters, wide),
        compute=DTYPES[compute],
        reduce=_dtype(options.reduce, wide),
        master=wide,
        gradient=None if options.gradients is None else DTYPES[options.gradients],
    )


def _dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    return default if name is None else DTYPES[name]


@cache
def fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32.

    On NVIDIA from compute capability 8.0; on a CPU with AMX or with AVX-512's bf16 dot products (about 7 and 4 times).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return " amx_bf16" in flags or " avx512_bf16" in flags


def autocast(world: World, call: Forward) -> Forward:
    """Wrap a forward in autocast, or return it as it is when there is nothing to cast."""
    chosen = world.policy
    if chosen.compute == chosen.param:
        return call
    kind, dtype = world.device.type, chosen.compute

    def forward(batch: Batch) -> Tensor:
        with torch.autocast(kind, dtype=dtype):
            return call(batch)

    return forward
