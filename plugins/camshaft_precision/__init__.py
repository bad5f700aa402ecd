"""Precision as a policy: dtypes that the owners of storage, computation and reduction read.

- ``fp64``: everything, for proofs.  - ``fp32``: everything.
- ``bf16``: matrix products in bf16 (autocast); weights, gradients, their reduction and the optimizer in fp32, so the
  weights that the model holds are the fp32 masters. Memory: the same as fp32 plus a bf16 copy of the weights in use.
- ``auto``: bf16 where the device is fast at it (NVIDIA from compute capability 8.0, CPUs with AMX or AVX-512 bf16),
  else fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import camshaft

if TYPE_CHECKING:
    from camshaft.hookspecs import Forward
    from camshaft.state import Policy, State, World


class Options(camshaft.Options):
    """Dtypes of a run."""

    compute: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    """Dtype of matrix products; `auto` takes bf16 where the device is fast at it."""


class Plugin(camshaft.Plugin):
    """Dtypes: fp64, fp32, or bf16 with fp32 master weights and reduction."""

    Options = Options

    @camshaft.hookimpl
    def precision(self, world: World) -> Policy:
        """The policy for this device."""
        from camshaft_precision.policy import policy

        return policy(self.options.compute, world.device)

    @camshaft.hookimpl
    def around_forward(self, state: State, call: Forward) -> Forward:
        """Autocast when the computation is narrower than the weights."""
        from camshaft_precision.policy import autocast

        return autocast(state.world, call)
