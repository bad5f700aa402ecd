"""Kernels as a plugin offers them in the hook ``kernels``, run on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from camshaft.host import Host, plugin_class
from camshaft.state import Policy
from camshaft.testing.conformance.kernels import BOUNDS, References, faults
from camshaft.testing.conformance.plain import one_world
from camshaft.testing.conformance.updates import NoReference

if TYPE_CHECKING:
    from camshaft.ops import Kernel
    from camshaft.state import World
    from camshaft.testing.conformance.trial import Trial


@dataclass
class Tried:
    """Kernels that were compared, as ``op by provider, dtype``, those that were not and why, and what is wrong."""

    compared: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left = f"; not on this machine: {'; '.join(self.left_out)}" if self.left_out else ""
        return f"compared with fp64: {'; '.join(self.compared) or 'nothing'}{left}"


def check_kernels(
    plugin: str, options: Any, trial: Trial, own: References, tell: Callable[[str, object], None]
) -> None:
    """Compare every kernel of ``plugin`` in each dtype that it can be used for here; ``tell`` which.

    Skips where none can be used, with the reasons. ``own``: references of operations of the plugin's own.

    Raises:
        AssertionError: it offers none, or one that there is nothing to compare with, or one is wrong.
    """
    import pytest

    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = one_world(trial.alone(trial.resolve(1)), "fp32")
    world.device = torch.device(device)
    ((_, offered),) = Host({plugin: plugin_class(plugin)(options)}).call("kernels", world)
    kernels = list(offered)
    assert kernels, f"'{plugin}' offers no kernel"
    tried = Tried()
    for kernel in kernels:
        _try(kernel, world, own, tried)
    tell("kernels", str(tried))
    assert tried.wrong == [], tried
    if not tried.compared:
        pytest.skip(str(tried))


def _try(kernel: Kernel, world: World, own: References, tried: Tried) -> None:
    for dtype in BOUNDS:
        world.policy = Policy(dtype, dtype, torch.float32, torch.float32)
        label, reason = f"{kernel.op} by {kernel.provider}, {dtype}", kernel.missing(world)
        if reason is not None:
            tried.left_out.append(f"{label}: {reason}")
            continue
        if dtype != torch.float32 and all(name.startswith("updates.") for name in kernel.entries() or ["its own"]):
            continue  # masters are fp32
        try:
            tried.wrong += faults(kernel, dtype, world.device.type, own)
        except NoReference as error:
            tried.wrong.append(f"{label}: {error}; say what in reference_kernels of the test's class")
        tried.compared.append(label)
