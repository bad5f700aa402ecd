"""Faster implementations of single operations, chosen by name or by measured times (``auto``), in a table of the run.

Operations are those of ``camshaft.ops``; providers are torch itself, Camshaft's kernels in Triton, NVIDIA apex, Liger,
Transformer Engine, flash-attention, and what other plugins offer in the hook ``kernels``. ``auto`` takes the fastest
that is present for device, dtype and size, by the user's own table (``camshaft bench kernels`` writes it), else by the
shipped one, else by rules that say why; rank 0 decides for all ranks. What was chosen, and why the others were not, is
logged once and kept as ``kernels.txt`` in the run's folder.

Invariant: an operation keeps its shapes, dtypes and gradients, up to the rounding that the dtype has anyway.
``linear_cross_entropy`` (Hsu et al., arXiv:2410.10989) makes no full logits, and its gradients in the forward: for T
tokens, h features and V words it holds T h and V h from there to the backward, in place of T V. Under a pipeline that
is for each microbatch under way in the last stage, and a split backward puts nothing of it off until W. Memory of the
others is told to ``camshaft plan``. Traffic: none.

Claims the implementation (``module.implementation``) of each operation that it replaces, as ``ops.<name>``, and of
``lm_head`` where the loss is made with it. This module imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import camshaft
from camshaft.claims import Claim, Plan, PlanContext
from camshaft_kernels.registry import AUTO, PACKAGES, PROVIDERS

if TYPE_CHECKING:
    from camshaft.activations import Kept
    from camshaft.estimate import Sizes
    from camshaft.models.config import ModelConfig
    from camshaft.ops import Kernel
    from camshaft.state import State, World
    from camshaft_kernels.choice import Choice
    from camshaft_kernels.usage import Usage

_logger = logging.getLogger("camshaft.kernels")


class Options(camshaft.Options):
    """A provider for each operation: ``auto``, or its name. An operation that is not named stays as it is."""

    all: Literal["auto"] | None = None
    """`auto`: for every operation that is not named here."""
    rms_norm: str | None = None
    """RMSNorm, with and without the residual's sum: torch, triton, apex, liger."""
    layer_norm: str | None = None
    """LayerNorm, for models that have it: torch, apex, liger."""
    rope: str | None = None
    """Rotary positions of queries and keys: torch, triton, liger."""
    swiglu: str | None = None
    """The activation of the MLP: torch, triton, liger."""
    linear_cross_entropy: str | None = None
    """Output projection and loss in one, without full logits: torch (any device), triton, liger; unfused: apart."""
    cross_entropy: str | None = None
    """The loss of given logits: torch, triton, liger, transformer_engine."""
    attention: str | None = None
    """Causal attention: torch, transformer_engine, flash_attention."""
    document_attention: str | None = None
    """Causal attention inside of documents (data.document_mask): torch (a mask), torch_segments (one call for each
    document), torch_varlen and flash_attention (GPU, 16 bits)."""
    adamw: str | None = None
    """The arithmetic of AdamW: torch, triton, apex."""
    lamb: str | None = None
    """The arithmetic of LAMB: torch, apex."""
    grad_norm: str | None = None
    """The norm of a list of gradients: torch, apex."""
    grouped_matmul: str | None = None
    """Products of several pairs of matrices, for models that have them: torch."""
    others: dict[str, str] = {}
    """Operations of other plugins: name to provider."""

    def wishes(self) -> dict[str, str]:
        """Operation to what the recipe says of it, in one order for all recipes; those it says nothing of left out."""
        from camshaft_kernels.registry import OPS

        named = {op: getattr(self, op) or self.all for op in OPS}
        return {**{op: wish for op, wish in named.items() if wish is not None}, **self.others}


class Plugin(camshaft.Plugin):
    """Faster implementations of single operations, chosen for this machine."""

    Options = Options
    draws = False
    commands: ClassVar[dict[str, str]] = {
        "bench": "camshaft_kernels.bench:main",
        "doctor": "camshaft_kernels.packages:found",
    }
    usual: ClassVar[dict[str, str]] = {"kernels": "{all: auto}"}
    taken: ClassVar[dict[str, tuple[str, ...]]] = {"kernel": (*PROVIDERS, AUTO)}
    packages = PACKAGES
    _choices: tuple[Choice, ...] = ()
    _usage: Usage | None = None

    @camshaft.hookimpl
    def plan(self, context: PlanContext) -> Plan:
        """Refuse what cannot be; claim what is replaced; need what other plugins are named for."""
        from camshaft_kernels.checks import Checks
        from camshaft_kernels.registry import own_form

        wishes = self.options.wishes()
        checks = Checks(wishes, context, self.name)
        replaced = [op for op, wish in wishes.items() if wish != own_form(op) and op not in checks.bars]
        targets = [f"ops.{op}" for op in replaced] + ["lm_head"] * ("linear_cross_entropy" in replaced)
        return Plan(
            claims=tuple(Claim("module.implementation", target=target) for target in targets),
            requires=checks.requires(),
            problems=tuple(checks.problems()),
        )

    @camshaft.hookimpl
    def activations(self, context: PlanContext, sizes: Sizes, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
        """What fused operations keep, in place of torch's own."""
        from camshaft_kernels.checks import Checks
        from camshaft_kernels.kept import change

        return change(kept, Checks(self.options.wishes(), context, self.name), sizes)

    @camshaft.hookimpl
    def kernels(self, world: World) -> Iterator[Kernel]:
        """Everything that this plugin knows."""
        from functools import partial

        from camshaft.ops import Kernel
        from camshaft_kernels.limits import missing
        from camshaft_kernels.offers import LIST

        for offer in LIST:
            yield Kernel(offer.op, offer.provider, offer.entries, partial(missing, offer))

    @camshaft.hookimpl
    def rewrite(self, world: World, config: ModelConfig) -> None:
        """Choose, replace and tell."""
        from camshaft_kernels.checks import Checks
        from camshaft_kernels.choice import choose, offered
        from camshaft_kernels.entries import entries_of
        from camshaft_kernels.usage import Usage

        wishes, names = self.options.wishes(), tuple(world.recipe.plugins)
        checks = Checks(wishes, PlanContext(world.recipe, world.mesh.shape, names, world.device.type), self.name)
        kernels = offered(world.kernels)
        self._choices = tuple(choose(wishes, checks.bars, kernels, world, config, f"plugins.{self.name}"))
        self._usage = Usage(world, foreign=checks.foreign)
        for choice in self._choices:
            if choice.changes:
                kernel = kernels[choice.op][choice.provider]
                world.ops.replace(self._usage.watch(choice.op, entries_of(kernel)))
        if world.is_main:
            self._tell(world)

    def _tell(self, world: World) -> None:
        from camshaft_kernels.report import render

        text = render(self._choices)
        try:
            world.run.path.mkdir(parents=True, exist_ok=True)
            world.run.keep("kernels.txt", text)
        except OSError as error:
            _logger.warning("kernels.txt cannot be written: %s", error)
        _logger.info("implementations of operations\n%s", text.rstrip())

    @camshaft.hookimpl
    def inert(self, state: State) -> str | None:
        """Whether something that the recipe names is never called. ``auto`` that leaves everything as it is, is told
        in the table and is no fault.
        """
        assert self._usage is not None
        idle = self._usage.idle(self._choices, state)
        if not idle:
            return None
        return f"{', '.join(idle)}: replaced, and nothing in {type(state.model).__name__} or its optimizer calls it"
