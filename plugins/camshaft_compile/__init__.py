"""Blocks compiled with ``torch.compile`` (Ansel et al., ASPLOS 2024): one graph, compiled once for all layers alike.

Each module that ``modules`` names (the model's layers) gets a forward of its own, in place: names, parameters and
state dicts stay. Parameters are inputs of the graph, so modules of one class with equal shapes share it; only a layer
that differs (its shapes, its class) gets another one. What other plugins have put around forwards before (the exchanges
of tensor parallel, recomputation) is part of the graph; hooks on the block itself (stage 3 gathers there) run outside.

Invariant: numbers are those of the uncompiled run but for the order of sums inside of fused kernels: 1e-12 relative in
fp64, the dtype's own rounding else; with the backend ``aot_eager`` no bit of fp32 and fp64 differs.

The first window of a process runs uncompiled, since other plugins learn in it what runs when; the next one compiles.
``plugin/compile/recompiles`` and ``plugin/compile/graph_breaks`` are counted since the last record, and must be 0 after
that: the first window and the first evaluation that are compiled warm up; later events are told with their reason
(the guard that failed), or end the run with ``strict``. Shapes never change: short windows and evaluations have rows
without labels.

Memory and traffic: traffic is unchanged. Inductor recomputes cheap pointwise operations in backward (a minimum cut of
the joint graph), so less is kept than without it: of the built-in decoder's layers what ``camshaft_compile.kept`` says,
but all of it in the first window. Other backends keep what they are given. Claims nothing. Every module inside of a
compiled one is in ``world.pieces``.

Refused: modules inside of which others put hooks or forwards later (split backwards of a pipeline, DeepSpeed's stage
3), the backend ``inductor`` where there is no compiler, CUDA graphs elsewhere than on CUDA, with several microbatches a
step, or with attention that takes bounds of documents. This module imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import camshaft
from camshaft_compile import rules

if TYPE_CHECKING:
    from torch.nn import Module

    from camshaft.activations import Kept
    from camshaft.estimate import Sizes
    from camshaft.hookspecs import Forward
    from camshaft.state import State, World
    from camshaft_compile.blocks import Blocks
    from camshaft_compile.watching import Watcher


class Options(camshaft.Options):
    """What is compiled, and how."""

    modules: list[str] = []
    """Globs over names of modules, each of which is compiled as one (`model.layers.*`; a `*` stands for one level);
    empty: the model's layers."""
    backend: str = "inductor"
    """What compiles the graph: `inductor`, or another one that `torch.compiler.list_backends` knows; `aot_eager` and
    `eager` compile nothing, and show what of a problem is the tracing's."""
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """How long inductor looks for fast kernels."""
    dynamic: bool = False
    """One graph for all shapes instead of one for each. The engine's batches all have one shape."""
    fullgraph: bool = False
    """A graph break is an error, told by torch with its place."""
    cuda_graphs: bool = False
    """Record each block's kernels as a CUDA graph and replay it, which saves the time of launches; only on CUDA, and
    costs memory for what the graphs keep."""
    strict: bool = False
    """A recompilation or a graph break after the first compiled window ends the run, instead of a warning."""
    cache_dir: str | None = None
    """Folder for compiled code, which later runs reuse; absent, the environment's TORCHINDUCTOR_CACHE_DIR, else one of
    torch's own."""


class Plugin(camshaft.Plugin):
    """Blocks compiled with torch.compile, one graph for all layers that are alike."""

    Options = Options
    draws = False
    packages: ClassVar[dict[str, str]] = {"triton": "triton"}
    _blocks: Blocks | None = None
    _watcher: Watcher | None = None

    @camshaft.hookimpl
    def plan(self, context: camshaft.PlanContext) -> camshaft.Plan:
        """Refuse what cannot be compiled here, or not beside the recipe's other plugins."""
        return camshaft.Plan(problems=tuple(rules.problems(self.options, context, f"plugins.{self.name}")))

    @camshaft.hookimpl
    def activations(
        self, context: camshaft.PlanContext, sizes: Sizes, kept: tuple[Kept, ...]
    ) -> tuple[Kept, ...] | None:
        """Without what Inductor makes again."""
        if self.options.backend != "inductor":
            return None
        from camshaft_compile.kept import change

        return tuple(change(self.options, context, sizes, kept))

    @camshaft.hookimpl
    def compile_model(self, world: World, model: Module) -> None:
        """Give the modules compiled forwards, which are not used yet."""
        from camshaft_compile.blocks import Blocks

        self._blocks = Blocks(self.options, world, model, self.name)

    @camshaft.hookimpl
    def around_forward(self, state: State, call: Forward) -> Forward:
        """Count what evaluation compiles."""
        from camshaft_compile.watching import Watcher

        assert self._blocks is not None
        self._watcher = Watcher(state, self.name, self._blocks, strict=self.options.strict)
        return self._watcher.around(call)

    @camshaft.hookimpl
    def pre_run(self, state: State) -> None:
        """Refuse what was put inside of compiled modules after they were compiled."""
        assert self._blocks is not None
        self._blocks.check(state.model)

    @camshaft.hookimpl
    def post_backward(self, state: State) -> None:
        """At the end of a window, count what it compiled."""
        if state.last_backward and self._watcher is not None:
            self._watcher.end_window()

    @camshaft.hookimpl
    def post_step(self) -> None:
        """From the second window on, compiled code runs."""
        assert self._blocks is not None
        self._blocks.begin()

    @camshaft.hookimpl
    def inert(self, state: State) -> str | None:
        """The first step never is compiled."""
        if state.world.total_steps == 1:
            return "the run has one step, which is never compiled"
        return None

    @camshaft.hookimpl
    def close(self) -> None:
        """Give the modules their own forwards back."""
        if self._blocks is not None:
            self._blocks.close()
