"""Precision as a policy: dtypes that the owners of storage, computation and reduction read.

Mixed precision with master weights and dynamic loss scaling after Micikevicius et al. (arXiv:1710.03740). ``compute``:

- ``fp64``: everything, for proofs.  - ``fp32``: everything.
- ``bf16``, ``fp16``: matrix products in 16 bits. With wide parameters (the default) by autocast: the weights that the
  model holds are the fp32 masters; memory as in fp32 plus a 16-bit copy of the weights in use.
- ``auto``: what narrow ``parameters`` are in; else bf16 where the device is fast at it (NVIDIA from compute capability
  8.0, CPUs with AMX or AVX-512 bf16), else fp32.

``parameters: bf16`` or ``fp16``: the model holds narrow parameters and everything in it but the loss runs in that
dtype; the optimizer updates fp32 masters. Model state with Adam: (2 + 2 + 12) bytes a parameter, and 4 more for the
widened gradient between reduction and step where no plugin owns storage. Gradients of the microbatches of a window are
then added up in the narrow dtype, where a small one next to a large sum is lost (bf16 has 8 significant bits): with
accumulation set ``gradients: fp32``, 2 bytes a parameter more, in which backward adds up and sums are kept; and
``reduce`` is what gradients are in on the wire only, rounded back to ``gradients`` after it.

fp16 reaches from 6e-8 to 65,504 only, so with ``compute: fp16`` the loss is multiplied by a scale, and the reduced
gradients are divided by it. Invariant: whether they overflowed is one decision of all ranks (a maximum over every axis:
4 bytes a step and axis, and one wait for the device); then the step is skipped on all: parameters, masters and
optimizer state keep every bit, and the scale is halved. After ``growth_interval`` good steps in a row it is doubled.
Scales are powers of two, so nothing is rounded by them. What a skipped step does not stop: the step counter, the
learning-rate schedule and the consumed samples go on; the window's samples are not seen again.
``plugin/precision/loss_scale`` (of the next step) and ``plugin/precision/skipped_steps`` (since the run began) are
logged; a record of a skipped step has no ``train/grad_norm``. Other dtypes scale nothing. Claims nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

import camshaft
from camshaft_precision import rules

if TYPE_CHECKING:
    from camshaft.hookspecs import Forward, Step
    from camshaft.state import Policy, State, World
    from camshaft_precision.scaler import LossScaler


class Options(camshaft.Options):
    """Dtypes of a run."""

    compute: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of matrix products; `auto` takes that of narrow parameters, else bf16 where the device is fast at it."""
    parameters: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of the model's parameters and of the gradients that backward makes; null: fp32 (fp64 with `compute: fp64`).
    Narrow ones have fp32 masters, which the optimizer updates."""
    gradients: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype in which gradients are added up over microbatches and kept until the step; null: as `parameters`."""
    reduce: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of gradients while they are summed over ranks; null: fp32 (fp64 with `compute: fp64`)."""
    initial_loss_scale: Annotated[float, Field(ge=1, le=2**32)] = 65536.0
    """Factor on the loss in the first step of fp16, a power of two."""
    growth_interval: Annotated[int, Field(ge=1)] = 2000
    """Steps of fp16 without overflow after which the loss scale is doubled."""


class Plugin(camshaft.Plugin):
    """Dtypes: fp64, fp32, bf16 or fp16, with fp32 masters, and loss scaling where fp16 needs it."""

    Options = Options
    _scaler: LossScaler | None = None

    @camshaft.hookimpl
    def plan(self) -> camshaft.Plan:
        """Bytes of an element of each kind; refuse dtypes that make no sense together."""
        faults = tuple(rules.problems(self.options, f"plugins.{self.name}"))
        return camshaft.Plan(problems=faults, widths=rules.widths(self.options))

    @camshaft.hookimpl
    def precision(self, world: World) -> Policy:
        """The policy for this device."""
        from camshaft_precision.policy import policy

        return policy(self.options, world.device)

    @camshaft.hookimpl
    def around_forward(self, state: State, call: Forward) -> Forward:
        """Autocast when the computation is narrower than the weights."""
        from camshaft_precision.policy import autocast

        return autocast(state.world, call)

    @camshaft.hookimpl
    def around_step(self, state: State, call: Step) -> Step:
        """With fp16, set the loss scale, and step only where gradients are finite; else leave the step as it is."""
        if not rules.scales(self.options):
            return call
        from camshaft_precision.scaler import LossScaler

        self._scaler = scaler = LossScaler(
            state, self.name, initial=self.options.initial_loss_scale, growth_interval=self.options.growth_interval
        )
        return lambda: scaler.step(call)

    @camshaft.hookimpl
    def post_reduce(self) -> None:
        """Divide the gradients by the loss scale, and agree with all ranks whether they are finite."""
        if self._scaler is not None:
            self._scaler.unscale()

    @camshaft.hookimpl
    def state_dict(self) -> Mapping[str, Any]:
        """Scale and counters; nothing where nothing is scaled."""
        return {} if self._scaler is None else self._scaler.state_dict()

    @camshaft.hookimpl
    def load_state_dict(self, entries: Mapping[str, Any]) -> None:
        """Go on with the saved scale; a run that was saved without one starts with the recipe's."""
        if self._scaler is not None and entries:
            self._scaler.load_state_dict(entries)
