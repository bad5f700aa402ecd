"""Every hook, in the order in which a run calls them.

Build hooks are collected with pluggy, once, in recipe order. Hooks of the step are bound to plain callables when the
run is built: no pluggy call happens inside a step. An implementation may leave out parameters that it does not
need; it may not give parameters defaults or make them keyword-only.

Kinds, given in each hook's first line:
  collected   every plugin answers, the core uses all answers;
  slot        exactly one owner; two owners are an error that names both;
  chain       every plugin may change the object, in recipe order;
  event       every plugin is called, nothing is returned;
  middleware  each plugin wraps the callable once, the first plugin of the recipe outermost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from camshaft.plugin import hookspec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from camshaft.activations import Kept
    from camshaft.claims import Plan, PlanContext
    from camshaft.data.loader import Batch
    from camshaft.errors import Problem
    from camshaft.estimate import Estimate, Sizes
    from camshaft.mesh import MeshShape
    from camshaft.models.config import ModelConfig
    from camshaft.models.shapes import ParameterShape
    from camshaft.ops import Kernel
    from camshaft.program import Action, Kind
    from camshaft.state import Policy, State, World

Forward = Callable[["Batch"], "Tensor"]
Step = Callable[[], None]
Shapes = tuple["ParameterShape", ...]
Activations = tuple["Kept", ...]
LogRecord = Mapping[str, float | int]


class BuildHooks:
    """Called once each, before the first step."""

    @hookspec
    def plan(self, context: PlanContext) -> Plan:
        """Collected. Say what this plugin will own, what it needs and gives, and what is wrong with its options.

        Called by ``validate``, ``plan`` and ``train`` before torch is imported. Must be pure: the same context gives
        the same plan on every rank. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def shapes(self, context: PlanContext, parameters: Shapes, rank: int) -> Iterable[ParameterShape] | None:
        """Chain. Return what ``rank`` has of ``parameters``: those of its stages, in the shapes of its boxes.

        Each plugin gets what the one before it returned, first of all the whole model; None leaves it as it is. Called
        by ``plan`` alone, after every plan was accepted, and must agree with what ``split`` and ``shard_compute``
        build. Must be pure and need no torch. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def misfits(self, context: PlanContext, sizes: Sizes) -> Iterable[Problem] | None:
        """Collected. What is wrong with what rank ``sizes.rank`` holds of the built-in model, in the sizes that axes
        which divide the model leave to it; None or nothing: all is well.

        Called by ``validate``, ``plan`` and ``train`` after every plan was accepted, for a rank of each place on the
        axes that do not split the batch. Must be pure and need no torch. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def activations(self, context: PlanContext, sizes: Sizes, kept: Activations) -> Activations | None:
        """Chain. Return what a forward keeps for its backward on rank ``sizes.rank``, changed; None leaves it.

        The first plugin gets what the built-in model keeps without any plugin, of this rank's layers. Called by
        ``plan`` alone, before ``estimate``. Must be pure and need no torch. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def estimate(self, context: PlanContext, sizes: Sizes) -> Estimate | None:
        """Collected. Bytes on a rank and bytes that a rank sends in a step, for ``camshaft plan``; None: none.

        ``sizes`` are those of rank ``sizes.rank``, of what axes that divide the model leave to it. Called by ``plan``
        alone, after every plan was accepted. Must be pure and need no torch. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def precision(self, world: World) -> Policy:
        """Slot. The dtypes of parameters, computation, reduction and master weights, as data that owners read.

        Called first of the build, when the device is known (``world.policy`` is still the default, all fp32).
        Without an owner everything is fp32. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def kernels(self, world: World) -> Iterable[Kernel]:
        """Collected. Implementations of operations (``camshaft.ops``) that this plugin offers, whether or not they can
        be used in ``world``. Import what they need only when they are chosen. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def rewrite(self, world: World, config: ModelConfig) -> ModelConfig | None:
        """Chain. Return a changed architecture before any module exists, or None to leave it; ``world.ops`` may be
        changed here too. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def build_model(self, world: World, config: ModelConfig) -> Module:
        """Slot. Build the model on the meta device.

        Its ``forward(batch)`` returns the sum of the token losses as a scalar tensor in fp32 or wider; the number of
        tokens comes with the batch. Without an owner: the Llama-family decoder. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def split(self, world: World, model: Module) -> Module:
        """Slot. Keep this rank's part of the model. The only phase that may change parameter names. Since API 1."""
        raise AssertionError

    @hookspec
    def shard_compute(self, world: World, model: Module) -> None:
        """Chain. Divide computation along claimed axes (tensor, sequence, context parallel). Since hook API 1."""
        raise AssertionError

    @hookspec
    def recompute(self, world: World, model: Module) -> None:
        """Chain. Wrap modules so that their activations are recomputed in backward. Since hook API 1."""
        raise AssertionError

    @hookspec
    def compile_model(self, world: World, model: Module) -> None:
        """Chain. Compile modules in place. Since hook API 1."""
        raise AssertionError

    @hookspec
    def shard_storage(self, world: World, model: Module) -> None:
        """Chain. Lay out parameters and gradients along claimed data axes; the model is still on meta. Since API 1."""
        raise AssertionError

    @hookspec
    def materialize(self, world: World, model: Module) -> None:
        """Slot. Give every parameter its storage and first value, which depends on seed and name only.

        The owner also sets ``world.parts``, if what the optimizer updates is not the model's parameters themselves.
        Without an owner: ``camshaft.models.init.materialize`` on ``world.device``. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def optimizer(self, world: World, model: Module) -> Optimizer:
        """Slot, required. Build the optimizer over ``world.parts.tensors``: the parameters that train, or what holds
        them (parts of them, side by side, in the master dtype). Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def schedule(self, mesh: MeshShape, rank: int, microbatches: int) -> tuple[Action, ...]:
        """Slot. The program of one window for ``rank``. Pure, and made without torch, so that ``plan`` can show it.

        Without an owner: forward and backward of each microbatch in turn, then REDUCE, CLIP, STEP. Since API 1.
        """
        raise AssertionError

    @hookspec
    def handlers(self, state: State) -> Mapping[Kind, Callable[[Action], None]]:
        """Collected. Callables for kinds of action that the core has none for; each kind has one owner.

        The callable gets the action. The owner of ``schedule`` may also take F and B from the core, and makes them of
        ``state.strokes``. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def bind(self, state: State) -> None:
        """Event. Everything is built; take the references that your step hooks need.

        May change no parameter's name, layout or ``requires_grad``: others have taken their references too.
        Since hook API 1.
        """
        raise AssertionError


class StepHooks:
    """Bound once to plain callables, called positionally in every step."""

    @hookspec
    def pre_forward(self, state: State, batch: Batch) -> None:
        """Event. Before the forward of one microbatch, in training only; may change the batch, but not how many labels
        count: the sum that divides the loss is already under way. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def around_forward(self, state: State, call: Forward) -> Forward:
        """Middleware. Wrap the forward (autocast, ranges); also used by evaluation.

        Called once, before ``bind``: what it returns runs each time. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def post_backward(self, state: State) -> None:
        """Event. After the backward of one microbatch; ``state.final_backward`` marks the window's last.

        Leave gradients alone here: an owner may already be sending them. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def reduce(self, state: State) -> None:
        """Event. Finish the reduction of gradients on every claimed axis.

        When the last owner returns, gradients are the final sums that one process would have. To read or change them,
        implement ``post_reduce``. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def reduce_parts(self, state: State) -> None:
        """Event. Finish sums along axes that divide the model itself (``tp``), in ``part.tensor.grad`` of
        ``state.world.parts``: they are summed along the data axes by now.

        Called after ``reduce`` and before ``post_reduce``. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def post_reduce(self, state: State) -> None:
        """Event. Gradients are final on every axis, in ``part.tensor.grad`` of ``state.world.parts``, and not clipped
        yet: here they may be read or changed, on all ranks alike. The owner of ``precision`` comes first, whatever the
        recipe's order: it divides out the loss scale. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def clip(self, state: State) -> Tensor:
        """Slot. Limit the gradients in place and return the global norm before clipping, a scalar on the device.

        Without an owner the norm is not computed. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def lr(self, step: int) -> float:
        """Slot. Factor on the optimizer's learning rate for step ``step`` (0 is the first). Pure. Since API 1."""
        raise AssertionError

    @hookspec
    def around_step(self, state: State, call: Step) -> Step:
        """Middleware. Wrap the optimizer step (loss scaling, parameter gathering).

        Called once, before ``bind``: what it returns runs in each step. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def step(self, state: State) -> None:
        """Slot. Update the parameters. Without an owner: ``state.optimizer.step()``. Since hook API 1."""
        raise AssertionError

    @hookspec
    def release(self, state: State) -> None:
        """Slot. Make the gradients ready for the next window.

        Without an owner every gradient is freed, of parameters and of parts. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def post_step(self, state: State) -> None:
        """Event. The step is counted, its gradients are released, its records are written. No host sync.

        A checkpoint that is made here is of a step whose records exist. Since hook API 1.
        """
        raise AssertionError


class RunHooks:
    """Called now and then: at the start, at log intervals, for checkpoints, at the end."""

    @hookspec
    def inert(self, state: State) -> str | None:
        """Collected. Why this plugin has had no effect on the run so far, in one sentence; None when it had one.

        Called once, after the first step that a process runs; a reason on any rank stops the run on all. Without an
        implementation a plugin has had an effect if one of its hooks ran; those that run later, or only tell, do not
        count: plan, shapes, activations, estimate, kernels, handlers, state_dict, load_state_dict, post_load, close.
        Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def load(self, state: State) -> bool:
        """Slot. Continue an earlier run: fill ``state`` and return True, or return False and change nothing.

        Called after ``bind``, before ``pre_run``. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def post_load(self, state: State) -> None:
        """Event. State was loaded: derive from ``world.parts`` what follows from it (parameters from master weights).

        Called where ``load`` returned True. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def pre_run(self, state: State) -> None:
        """Event. Before the first step, after ``load``: trackers open here. Since hook API 1."""
        raise AssertionError

    @hookspec
    def log(self, state: State, record: LogRecord) -> None:
        """Event. A record of metrics, on every rank; trackers write on rank 0 only.

        Keys are metric names (``train/loss``), values host numbers: ``train/``, ``eval/`` and ``progress/`` are
        equal on all ranks, ``perf/`` and ``memory/`` are the rank's own. Every record has ``progress/global_step``;
        evaluation records hold ``eval/...`` instead of ``train/...``. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def save(self, state: State) -> None:
        """Slot. Write a checkpoint now, durable when this returns. Called by the core when a run is asked to stop,
        and at its end. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def state_dict(self, state: State) -> Mapping[str, Any]:
        """Collected. State of this plugin's own that a resumed run needs: numbers, strings, lists and dicts of
        them (kept as JSON under the plugin's name). Equal on all ranks that have the same parameters: what differs
        along ``pp`` is kept for each place there. Since hook API 1.
        """
        raise AssertionError

    @hookspec
    def load_state_dict(self, state: State, entries: Mapping[str, Any]) -> None:
        """Event. Given to each plugin with what its own ``state_dict`` returned. Since hook API 1."""
        raise AssertionError

    @hookspec
    def close(self, state: State, status: str) -> None:
        """Event, in reverse order, always called. ``status``: ``finished``, ``interrupted`` or ``failed``.

        A tracker's ``close`` must not raise; remove every hook that was put on a module or tensor. Since API 1.
        """
        raise AssertionError


FAMILIES = (BuildHooks, StepHooks, RunHooks)
SLOTS = frozenset(
    {
        "precision", "build_model", "split", "materialize", "optimizer", "schedule", "clip", "lr", "step", "release",
        "load", "save",
    }
)  # fmt: skip
MIDDLEWARE = frozenset({"around_forward", "around_step"})
