"""What hooks are given: the world that a run is built in, and the state that its steps change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer

    from camshaft.data.loader import Loader, Window
    from camshaft.distributed import Control
    from camshaft.masters import Masters
    from camshaft.mesh import Mesh
    from camshaft.models.config import ModelConfig
    from camshaft.ops import Kernel, Ops
    from camshaft.parts import Box, Parts
    from camshaft.recipe.schema import Recipe
    from camshaft.rundir import RunDirectory
    from camshaft.strokes import Strokes


Component = tuple[str, Callable[[], Mapping[str, Any]], Callable[[Mapping[str, Any]], None]]


@dataclass(frozen=True, slots=True)
class Policy:
    """Dtypes that owners of storage, computation and reduction read.

    ``param``: of the model's parameters and of the gradients that backward makes; ``compute``: of matrix products;
    ``reduce``: of gradients while they are summed over ranks; ``master``: of the weights that the optimizer updates,
    kept beside the parameters where it differs from ``param``.
    """

    param: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype
    master: torch.dtype
    gradient: torch.dtype | None = None
    """Of summed gradients while they are kept until the step; None: as ``param``."""

    @property
    def kept(self) -> torch.dtype:
        """Dtype of summed gradients while they are kept until the step."""
        return self.param if self.gradient is None else self.gradient


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Batch algebra, resolved: global = micro x accumulation x batch degree of the mesh."""

    micro_batch_size: int
    global_batch_size: int
    accumulation: int


def _no_parts() -> Parts:
    from camshaft.parts import Parts

    return Parts(())


def _torch_ops() -> Ops:
    from camshaft.ops import Ops

    return Ops()


@dataclass(slots=True)
class World:
    """What a run is built in. ``rank`` is global; ``device`` is this rank's; ``policy`` is set by the build."""

    recipe: Recipe
    mesh: Mesh
    rank: int
    world_size: int
    device: torch.device
    policy: Policy
    batch: BatchPlan
    run: RunDirectory
    total_steps: int
    """Optimizer steps of the whole run, from max_steps, max_epochs or max_tokens."""
    roles: dict[str, str] = field(default_factory=dict)
    """Parameter name to role: ``matrix``, ``embedding``, ``norm`` or ``bias``; filled when the model is built."""
    boxes: dict[str, Box] = field(default_factory=dict)
    """Which rectangle of the whole each of this rank's parameters is, by name; set in ``shard_compute`` by the owner of
    an axis that divides the model, for every parameter, also those that it replicates. Empty: all are whole."""
    pieces: set[str] = field(default_factory=set)
    """Names of modules that run as one (compiled) piece; set in ``compile_model``. Hooks on a module inside of one are
    not run: put them on the piece."""
    stages: dict[str, int] = field(default_factory=dict)
    """Pipeline stage of each of this rank's parameters, by name; set by the owner of ``split``. Empty: all in 0."""
    makes_loss: bool = True
    """Whether the loss of this rank's samples is made on this rank; the others along ``pp`` have none to tell."""
    parts: Parts = field(default_factory=lambda: _no_parts())
    """What an optimizer updates, of parameters that train; set by the owner of ``materialize``, else by the build."""
    stored: Parts = field(default_factory=lambda: _no_parts())
    """Parameters that do not train and are divided over ranks: they have no part that is updated."""
    ops: Ops = field(default_factory=lambda: _torch_ops())
    """Implementations that the model and the optimizer call; changed in ``rewrite`` alone."""
    kernels: list[Kernel] = field(default_factory=list)
    """Every implementation that an enabled plugin offers."""
    givers: set[str] = field(default_factory=set)
    """Plugins of whose implementations one was taken, or weighed against others: that is their effect. Filled when its
    ``entries`` or its ``missing`` is called.
    """
    scales_gradients: bool = False
    """Whether the optimizer multiplies gradients by ``state.gradient_scale`` in its own pass over them; set by the
    owner of ``optimizer``. The owner of ``clip`` may then leave that to it."""
    draws: bool = True
    """Whether forwards may draw random numbers. Plugins say it of themselves (``Plugin.draws``), models do with an
    attribute of that name; who says nothing is taken to draw. The built-in decoder draws none. Set by the build."""
    readable: bool = True
    """Whether every parameter of the model can be read where it is on this rank, outside of a forward, after
    ``settle()``."""
    settle: Callable[[], None] = lambda: None
    """Wait until parameters that are on their way from other ranks after a step are there; ``parts`` need no wait."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that talks to people and trackers."""
        return self.rank == 0


@dataclass(slots=True)
class State:
    """What a run changes. Hooks of the step get this object; plugins keep what is theirs in themselves."""

    world: World
    config: ModelConfig
    model: Module
    optimizer: Optimizer
    loader: Loader
    control: Control
    data_fingerprint: str = ""
    """Digest of everything that decides what a sample holds; a resumed run compares it."""
    step: int = 0
    """Optimizer steps done."""
    microbatch: int = 0
    """Microbatch that is being worked on."""
    stage: int = 0
    """Pipeline stage that is being worked on, of those that this rank has."""
    final_backward: bool = False
    """True during the window's last backward of ``stage`` (of its weights, where that is an action of its own):
    gradients of its parameters are complete when it ends."""
    last_backward: bool = False
    """True during the last backward of the window on this rank, whatever its stage."""
    inputs_only: bool = False
    """True during a backward of inputs alone (I): no parameter gets a gradient before the W that follows."""
    window: Window | None = None
    loss: Tensor | None = None
    """Sum of token losses of this rank's part of the window, detached."""
    grad_norm: Tensor | None = None
    """Global gradient norm before clipping, of the step just done; None if it was skipped."""
    loss_scale: Tensor | None = None
    """Factor on the loss in backward, a scalar on the device, which the owner of ``precision`` sets, and divides out in
    ``post_reduce``; None is 1."""
    gradient_scale: Tensor | None = None
    """Factor, a scalar on the device, that the optimizer has yet to multiply the gradients by, where
    ``world.scales_gradients``; None is 1. Set in ``clip``, and None again after the step."""
    skipped: bool = False
    """True when the step just done changed no weight and no optimizer state: an owner (in ``around_step``) found its
    gradients unusable, on all ranks alike. The step is counted all the same, and its samples are consumed."""
    lr: float = 0.0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    masters: Masters | None = None
    """Master weights that the core keeps, where they differ from the parameters and no owner of storage has them."""
    strokes: Strokes | None = None
    """What forward and backward of a microbatch are made of, for a plugin that runs F and B itself."""
    extras: dict[str, float] = field(default_factory=dict)
    """Host numbers that plugins add to the next log record, under ``plugin/<name>/<metric>``; empty after it."""
    components: list[Component] = field(default_factory=list)
    """(plugin, state_dict, load_state_dict) of each plugin that has state of its own; filled by the build."""

    def named_parameters(self) -> Mapping[str, Parameter]:
        """Every parameter once, tied ones under their first name."""
        return dict(self.model.named_parameters())
