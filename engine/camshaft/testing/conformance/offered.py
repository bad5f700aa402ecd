"""Kernels as a plugin offers them in the hook ``kernels``, run on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from camshaft.host import Host, plugin_class
from camshaft.testing.conformance.kernels import ARGUMENTS, BOUNDS, faults
from camshaft.testing.conformance.plain import one_world

if TYPE_CHECKING:
    from camshaft.testing.conformance.trial import Trial


def check_kernels(plugin: str, options: Any, trial: Trial) -> None:
    """Compare every kernel of ``plugin`` that can be used here; skip where none can be, with the reasons.

    Raises:
        AssertionError: it offers none, or one is further from fp64 than its bound.
    """
    import pytest

    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = one_world(trial.alone(trial.resolve(1)), "fp32")
    world.device = torch.device(device)
    ((_, offered),) = Host({plugin: plugin_class(plugin)(options)}).call("kernels", world)
    kernels = [kernel for kernel in offered if kernel.op in ARGUMENTS]
    assert kernels, f"'{plugin}' offers no kernel for an operation that the kit knows"
    missing = {kernel: kernel.missing(world) for kernel in kernels}
    usable = [kernel for kernel, reason in missing.items() if reason is None]
    if not usable:
        pytest.skip("; ".join(f"{kernel.op} by {kernel.provider}: {reason}" for kernel, reason in missing.items()))
    assert [line for kernel in usable for dtype in BOUNDS for line in faults(kernel, world, dtype, device)] == []
