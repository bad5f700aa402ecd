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
    from camshaft.mesh import Mesh
    from camshaft.models.config import ModelConfig
    from camshaft.recipe.schema import Recipe
    from camshaft.rundir import RunDirectory


Component = tuple[str, Callable[[], Mapping[str, Any]], Callable[[Mapping[str, Any]], None]]


@dataclass(frozen=True, slots=True)
class Policy:
    """Dtypes that owners of storage, computation and reduction read.

    ``param``: of the parameters that the optimizer updates when ``master`` equals it; ``compute``: of matrix products;
    ``reduce``: of gradients while they are summed over ranks; ``master``: of the weights that the optimizer updates.
    """

    param: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype
    master: torch.dtype


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Batch algebra, resolved: global = micro x accumulation x batch degree of the mesh."""

    micro_batch_size: int
    global_batch_size: int
    accumulation: int


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
    final_backward: bool = False
    """True during the window's last backward: gradients are complete when it ends."""
    window: Window | None = None
    loss: Tensor | None = None
    """Sum of token losses of this rank's part of the window, detached."""
    grad_norm: Tensor | None = None
    """Global gradient norm before clipping, of the step just done."""
    lr: float = 0.0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    extras: dict[str, float] = field(default_factory=dict)
    """Host numbers that plugins add to the next log record, under ``plugin/<name>/<metric>``; empty after it."""
    components: list[Component] = field(default_factory=list)
    """(plugin, state_dict, load_state_dict) of each plugin that has state of its own; filled by the build."""

    def named_parameters(self) -> Mapping[str, Parameter]:
        """Every parameter once, tied ones under their first name."""
        return dict(self.model.named_parameters())
