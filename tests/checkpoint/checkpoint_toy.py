"""A small run with everything that makes checkpoints hard, and the plugin under test bound to it.

Uneven sizes, tied, frozen, unused, zero-sized and 0-dim parameters, three dtypes, buffers that are kept and not kept.
Gradients depend on the parameters, so that any wrong bit spreads in the following steps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from camshaft.build import roles
from camshaft.masters import whole_parts
from camshaft.mesh import Mesh, MeshShape
from camshaft.recipe.schema import Recipe
from camshaft.rundir import RunDirectory
from camshaft.state import BatchPlan, Policy, State, World
from camshaft_checkpoint import Plugin, files

BATCH = {"micro_batch_size": 2, "global_batch_size": 4}
CHECKPOINTS = "checkpoints"


class Toy(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 15)
        self.frozen = nn.Linear(15, 3, bias=False)
        self.low = nn.Parameter(torch.empty(5, 3, dtype=torch.bfloat16))
        self.wide = nn.Parameter(torch.empty(3, 1, 5, dtype=torch.float64))
        self.scale = nn.Parameter(torch.empty(()))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.unused = nn.Parameter(torch.empty(2, 3))
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.arange(6).reshape(2, 3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("table", torch.ones(4), persistent=False)
        self.frozen.weight.requires_grad_(False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


class Plain(nn.Module):
    """Shapes that FSDP2 divides unevenly over 2 ranks, one with an empty share on rank 1."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Linear(7, 15)
        self.second = nn.Linear(15, 3)
        self.single = nn.Parameter(torch.empty(1, 6))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def make_optimizer(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    decay = [value for value in trained.values() if value.ndim >= 2]
    rest = [value for value in trained.values() if value.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    if kind == "reordered":
        groups = [{"params": list(reversed(trained.values())), "weight_decay": 0.1}]
    return optimizer_of(kind, groups)


class Counting(torch.optim.SGD):
    """Has state that is a plain number."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self.state[tensor]["count"] = self.state[tensor].get("count", 0) + 1
        return super().step(closure)


def optimizer_of(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if kind == "adagrad":  # makes all of its state at once
        return torch.optim.Adagrad(groups, lr=0.05)
    if kind == "nadam":  # has a second single number beside the count of steps
        return torch.optim.NAdam(groups, lr=0.05)
    if kind in ("sgd", "counting"):
        return (Counting if kind == "counting" else torch.optim.SGD)(groups, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), fused=kind == "fused")


def make_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int = 0,
    world_size: int = 1,
    total_steps: int = 1000,
) -> State:
    recipe = Recipe.model_validate(
        {"schema_version": 1, "name": "toy", "batch": BATCH, "launch": {"group_timeout_s": 20}}
    )
    single = Policy(torch.float32, torch.float32, torch.float32, torch.float32)
    world = World(
        recipe=recipe,
        mesh=Mesh(MeshShape.of(recipe.parallel, world_size), rank, None),
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        policy=single,
        batch=BatchPlan(2, 4, 1),
        run=RunDirectory(path),
        total_steps=total_steps,
        roles=roles(model),
    )
    world.parts = whole_parts(model, world.roles)
    return State(
        world=world,
        config=SimpleNamespace(),
        model=model,
        optimizer=optimizer,
        loader=SimpleNamespace(),
        data_fingerprint="data one",
        control=SimpleNamespace(),
        window=SimpleNamespace(),
    )  # type: ignore[arg-type]


class Run:
    """One rank of a toy run with the plugin bound. ``unused`` never has a gradient, ``up.bias`` from step ``late``."""

    late = 0

    def __init__(
        self,
        path: Path,
        rank: int = 0,
        world_size: int = 1,
        *,
        model: nn.Module | None = None,
        kind: str = "adamw",
        total_steps: int = 1000,
        **options: Any,
    ) -> None:
        self.model = model if model is not None else Toy()
        self.state = make_state(path, self.model, make_optimizer(self.model, kind), rank, world_size, total_steps)
        self.plugin = Plugin(Plugin.Options(**{"every_steps": 1, **options}))
        self.plugin.name = "checkpoint"
        self.plugin.bind(self.state)

    def load(self) -> bool:
        return self.plugin.load(self.state)

    def step(self) -> None:
        """One optimizer step, counted, without any hook."""
        state = self.state
        for name, parameter in state.model.named_parameters():
            if parameter.requires_grad and name not in self.idle:
                parameter.grad = gradient(name, parameter.detach(), state.step)
        state.optimizer.step()
        state.optimizer.zero_grad()
        self.count()

    @property
    def idle(self) -> set[str]:
        """Parameters without a gradient in the step to come."""
        return {"unused"} if self.state.step >= self.late else {"unused", "up.bias"}

    def count(self) -> None:
        """A step was done, and its numbers are finite."""
        state = self.state
        state.step += 1
        state.consumed_samples += 4
        state.consumed_tokens += 4 * 128
        state.grad_norm, state.loss = torch.tensor(1.0), torch.tensor(2.0)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            self.plugin.post_step(self.state)


def gradient(name: str, value: Tensor, step: int) -> Tensor:
    """Equal on every rank and for every layout: of the whole parameter, then divided like it."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    noise = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    full = (whole.double().sin() * 0.1 + noise).to(whole.dtype)
    if isinstance(value, DTensor):
        return distribute_tensor(full, value.device_mesh, value.placements)
    return full


def everything(state: State) -> dict[str, Any]:
    """Weights, buffers, optimizer state by parameter name, and counters; DTensors whole. Copies."""
    found: dict[str, Any] = {
        "step": state.step, "samples": state.consumed_samples, "tokens": state.consumed_tokens,
    }  # fmt: skip
    for name, value in state.model.state_dict().items():
        found[name] = _copy(value)
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = _copy(value)
    return found


def _copy(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().clone() if isinstance(value, Tensor) else value


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names at which two results of ``everything`` are not equal bit for bit, dtype and shape included."""
    return sorted(name for name in left.keys() | right.keys() if not _same(left.get(name), right.get(name)))


def _same(left: Any, right: Any) -> bool:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return type(left) is type(right) and left == right
    return left.dtype == right.dtype and left.shape == right.shape and _bits(left) == _bits(right)


def _bits(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def folder(path: Path, step: int) -> Path:
    return path / CHECKPOINTS / f"step_{step:08d}"


def steps(path: Path) -> list[int]:
    """Steps of the finished checkpoints of a run, ascending."""
    return sorted(int(entry.name[5:]) for entry in (path / CHECKPOINTS).glob("step_*") if entry.suffix != ".tmp")


def files_of(checkpoint: Path) -> Iterator[Path]:
    yield from sorted(entry for entry in checkpoint.iterdir() if entry.is_file())


def entries(path: Path) -> list[str]:
    """Names of everything in the folder of checkpoints of a run."""
    return sorted(entry.name for entry in (path / CHECKPOINTS).iterdir())


class Gate:
    """Holds the writer of a background save until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        original = files.write

        def write(descriptor: int, data: files.Data) -> None:
            self.reached.set()
            assert self.opened.wait(20)
            original(descriptor, data)

        patch.setattr(files, "write", write)
