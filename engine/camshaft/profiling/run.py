"""A profile from the recipe to the report, on one rank of as many as there are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from camshaft.datasheet import type_name
from camshaft.errors import Interrupted
from camshaft.loop import out_of_memory, session
from camshaft.profiling import findings, report
from camshaft.profiling.recording import Recorder, Recording, Settings

if TYPE_CHECKING:
    from camshaft.environment import Environment
    from camshaft.loop import Heartbeat, StopSignal, Trainer
    from camshaft.recipe import Resolved
    from camshaft.rundir import RunDirectory
    from camshaft.state import State


def run(
    resolved: Resolved,
    environment: Environment,
    directory: RunDirectory,
    heartbeat: Heartbeat,
    stop: StopSignal,
    settings: Settings,
    left_out: Sequence[str] = (),
) -> str:
    """Profile one rank; every rank leaves ``trace_rank_N.json``, and rank 0 ``profile.json`` and ``profile.txt``.

    Returns the report on rank 0, and nothing on the others. ``left_out`` names plugins that ``resolved`` is without.

    Raises:
        RecipeError: the data end before the last window.
        Interrupted: asked to stop.
        OutOfMemory: device or host memory ran out.
    """
    path = directory.path / f"trace_rank_{environment.rank}.json"
    with out_of_memory(), session(resolved, environment, directory) as trainer:
        recording = Recorder(trainer, heartbeat, stop).run(settings, path)
        heartbeat.beat(trainer.state.step, "log")
        if stop.requested and environment.world_size == 1:  # others would wait for this rank's findings
            raise Interrupted("asked to stop; no profile was written")
        own = _own(trainer, recording)
        every = _gather(environment, own)
        if environment.rank:
            return ""
        document = {
            "schema_version": 1,
            "name": resolved.recipe.name,
            "recipe": str(resolved.path),
            "settings": asdict(settings),
            "left_out": list(left_out),
            "mfu": _mfu(trainer.state, own, recording),
            "ranks": every,
        }
    words = report.text(document)
    (directory.path / "profile.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (directory.path / "profile.txt").write_text(words, encoding="utf-8")
    return words


def _own(trainer: Trainer, recording: Recording) -> dict[str, Any]:
    """This rank's findings."""
    world = trainer.state.world
    plain = findings.plain_seconds(recording.plain_s)
    facts = {
        "rank": world.rank,
        "device": device_name(world.device),
        "trace": recording.path.name,
        "plain_window_ms": None if plain is None else plain * 1e3,
    }
    if world.device.type == "cuda":
        facts["allocator_peak_bytes"] = torch.cuda.max_memory_allocated(world.device)
    return {**facts, **findings.examine(recording.path, recording.held, recording.gradients)}


def _gather(environment: Environment, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's findings on rank 0; the others get what they gave."""
    if environment.world_size == 1:
        return [own]
    import torch.distributed as dist

    group = dist.new_group(backend="gloo")
    found: list[Any] = [None] * environment.world_size
    dist.gather_object(own, found if environment.rank == 0 else None, dst=0, group=group)
    return found


def _mfu(state: State, own: dict[str, Any], recording: Recording) -> dict[str, Any]:
    world = state.world
    seconds = min(own["plain_window_ms"] or own["window_ms"], own["window_ms"]) / 1e3
    tokens = sum(recording.tokens) / len(recording.tokens)
    fast = torch.get_float32_matmul_precision() != "highest"
    return findings.utilisation(
        state.config.flops_per_token(world.recipe.data.sequence_length),
        tokens / seconds,
        world.world_size,
        own["device"],
        type_name(world.policy.compute, tf32=fast),
    )


def device_name(device: torch.device) -> str:
    """The device's own name, as the table of peaks has it; ``CPU`` for one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
