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

- ``fp8``: bf16, but for the matrix products of linear layers, which are made of 8-bit numbers (Micikevicius et al.,
  arXiv:2209.05433; recipes of torchao.float8) on GPUs that have them; ``camshaft_precision.linear`` says of what. The
  first and the last layer, the embedding and the output projection are kept out. Sizes that are no multiples of 16 are
  refused; tokens are padded with zeros where they are summed over. Memory is that of bf16 without its copies of these
  layers' weights. With ``delayed`` scaling: 12 bytes a layer and rank of traffic a step, and the history of amax is in
  checkpoints. A pipeline with split backward does not put these layers' weight products off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

import camshaft
from camshaft_precision import rules

if TYPE_CHECKING:
    from torch.nn import Module

    from camshaft.activations import Kept
    from camshaft.estimate import Sizes
    from camshaft.hookspecs import Forward, Step
    from camshaft.state import Policy, State, World
    from camshaft_precision.fp8 import Layers
    from camshaft_precision.scaler import LossScaler


class Fp8(camshaft.Options):
    """How linear layers are computed with `compute: fp8`."""

    recipe: Literal["tensorwise", "rowwise"] = "tensorwise"
    """What has a scale of its own: a tensor (gradients are e5m2 then), or each row of what a product sums over (all of
    it e4m3), which is more exact and slower."""
    scaling: Literal["current", "delayed"] = "current"
    """Scales from what a tensor holds now, or from the last `history` windows."""
    history: Annotated[int, Field(ge=1, le=2**16)] = 16
    """Windows whose largest values give the delayed scale."""
    weight_gradient: Literal["fp8", "bf16"] = "fp8"
    """What the product that makes the weight's gradient is computed in."""
    keep: list[str] | None = None
    """Globs over names of linear layers that stay in bf16; null: those of the first and of the last layer, and all
    that are in no layer (the output projection)."""


class Options(camshaft.Options):
    """Dtypes of a run."""

    compute: Literal["auto", "fp64", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """Dtype of matrix products; `auto` takes that of narrow parameters, else bf16 where the device is fast at it."""
    fp8: Fp8 = Fp8()
    """How linear layers are computed with `compute: fp8`."""
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
    """Dtypes: fp64, fp32, bf16, fp16 or fp8, with fp32 masters, and loss scaling where fp16 needs it."""

    Options = Options
    draws = False
    _anywhere: ClassVar[bool] = False
    """Whether fp8 is allowed without a GPU: torch has the products for CPUs too, slow ones, for our tests."""
    _scaler: LossScaler | None = None
    _layers: Layers | None = None

    @camshaft.hookimpl
    def plan(self, context: camshaft.PlanContext) -> camshaft.Plan:
        """Bytes of an element of each kind; refuse dtypes that make no sense together, or not on this machine."""
        key = f"plugins.{self.name}"
        faults = list(rules.problems(self.options, key))
        if not (self._anywhere and context.device == "cpu"):
            faults += rules.device_problems(self.options, context, key)
        if self.options.compute == "fp8" and context.config is not None:
            from camshaft_precision import choice

            faults += choice.faults(context.config, self.options.fp8.keep, key)
        device = "cpu" if context.recipe.launch.device == "cpu" else context.device
        return camshaft.Plan(problems=tuple(faults), widths=rules.widths(self.options, device))

    @camshaft.hookimpl
    def misfits(self, context: camshaft.PlanContext, sizes: Sizes) -> Iterator[camshaft.Problem]:
        """Layers that are uneven once other axes have divided them."""
        if self.options.compute == "fp8" and context.config is not None:
            from camshaft_precision import choice

            yield from choice.uneven(context.config, self.options.fp8.keep, sizes, f"plugins.{self.name}")

    @camshaft.hookimpl
    def activations(
        self, context: camshaft.PlanContext, sizes: Sizes, kept: tuple[Kept, ...]
    ) -> tuple[Kept, ...] | None:
        """With fp8, without copies of weights."""
        if self.options.compute != "fp8" or context.config is None:
            return None
        from camshaft_precision.kept import change

        return tuple(change(self.options.fp8, context, kept))

    @camshaft.hookimpl
    def precision(self, world: World) -> Policy:
        """The policy for this device."""
        from camshaft_precision.policy import policy

        if self.options.compute == "fp8":
            from camshaft_precision.fp8 import check_device

            check_device(world.device, f"plugins.{self.name}")
        return policy(self.options, world.device)

    @camshaft.hookimpl
    def recompute(self, world: World, model: Module) -> None:
        """With fp8, give linear layers their forwards: after what divides them, before what compiles them."""
        if self.options.compute == "fp8":
            from camshaft_precision.fp8 import Layers

            self._layers = Layers(self.options.fp8, world, model, self.name)

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
        """Divide the gradients by the loss scale, and agree with all ranks whether they are finite; with delayed fp8
        scales, agree on those of the next window."""
        if self._scaler is not None:
            self._scaler.unscale()
        if self._layers is not None and self._layers.ring is not None:
            self._layers.ring.turn()

    @camshaft.hookimpl
    def state_dict(self) -> Mapping[str, Any]:
        """Scale and counters of fp16, amax of delayed fp8; nothing where neither is."""
        if self._layers is not None and self._layers.ring is not None:
            return {"fp8": self._layers.ring.state_dict()}
        return {} if self._scaler is None else self._scaler.state_dict()

    @camshaft.hookimpl
    def load_state_dict(self, entries: Mapping[str, Any]) -> None:
        """Go on with the saved scales; a run that was saved without starts anew with the recipe's."""
        if self._scaler is not None and "loss_scale" in entries:
            self._scaler.load_state_dict(entries)
        if self._layers is not None and self._layers.ring is not None:
            self._layers.ring.load_state_dict(entries.get("fp8", {}))

    @camshaft.hookimpl
    def close(self) -> None:
        """Give linear layers their own forwards back."""
        if self._layers is not None:
            self._layers.close()
