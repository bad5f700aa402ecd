"""Options of ``deepspeed``, and which of them contradict each other. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

import camshaft
from camshaft.errors import Problem
from camshaft.mesh import stated_data_parallel

if TYPE_CHECKING:
    from camshaft.claims import PlanContext

Elements = Annotated[int, Field(ge=1, le=2**53)]
Place = Literal["none", "cpu", "nvme"]


class Options(camshaft.Options):
    """What DeepSpeed divides, moves and how. A size that is absent is DeepSpeed's own default."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: all-reduce alone; 1: optimizer state divided over `dp`; 2: gradients too; 3: parameters too."""
    offload_optimizer: Place = "none"
    """Keep master weights and optimizer state in host memory, and step there; nvme is refused, with the reason."""
    offload_parameters: Place = "none"
    """With stage 3: keep the parameters' shards in host memory, or on a disk, until they are gathered."""
    nvme_path: str | None = None
    """Folder on a fast local disk, for whatever is offloaded to nvme."""
    pin_memory: bool | None = None
    """Page-lock what is offloaded to host memory; by default where there is a GPU."""
    overlap_comm: bool | None = None
    """Reduce gradients while backward goes on; by default in stage 3 only."""
    contiguous_gradients: bool | None = None
    """Copy gradients side by side before they are reduced; on by default."""
    reduce_scatter: bool | None = None
    """Leave each rank the gradients that it owns rather than all; on by default."""
    reduce_bucket_size: Elements | None = None
    """Elements that are reduced at a time; a buffer of this size is kept."""
    allgather_bucket_size: Annotated[int, Field(ge=2, le=2**53, multiple_of=2)] | None = None
    """Stages 1 and 2: elements of updated parameters that are gathered at a time."""
    prefetch_bucket_size: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Stage 3: elements of parameters that are fetched ahead of use."""
    persistence_threshold: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Stage 3: parameters of at most so many elements stay gathered between steps."""
    max_live_parameters: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Stage 3: gathered elements on a rank, before some are let go."""
    max_reuse_distance: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Stage 3: keep a parameter that is used again within so many elements."""
    sub_group_size: Elements | None = None
    """Stage 3: elements that are updated at a time."""


STAGES = {
    "offload_parameters": (3,),
    "overlap_comm": (1, 2, 3),
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "offload_optimizer": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "prefetch_bucket_size": (3,),
    "persistence_threshold": (3,),
    "max_live_parameters": (3,),
    "max_reuse_distance": (3,),
    "sub_group_size": (3,),
}
"""Stages in which an option does something."""


def problems(options: Options, context: PlanContext, key: str) -> Iterator[Problem]:
    """Everything that DeepSpeed cannot do, or that would do nothing; ``key`` is the plugin's in the recipe."""
    if context.device != "any" and not _installed():
        yield Problem(
            "DeepSpeed is not installed",
            key=key,
            fix=f"install deepspeed, or take plugins.zero (or plugins.ddp for stage 0) in place of {key}",
        )
    yield from _options(options, key)
    yield from _mesh(context)
    precision = context.recipe.plugins.get("precision")
    if getattr(precision, "compute", None) == "fp64":
        yield fp64_problem(key)
    if options.stage and getattr(precision, "parameters", None) == "fp16":
        yield fp16_problem(options.stage, key)
    if getattr(precision, "parameters", None) == "bf16" and getattr(precision, "gradients", None) == "fp32":
        yield from _ignored(options, key)
    if stated_data_parallel(context.recipe.parallel) == 1 and options.offload_optimizer == "none":
        yield Problem(
            "divides over the data axis alone, and the recipe gives that axis one rank",
            key=key,
            fix=f"remove {key}, or set parallel.data_parallel=auto",
        )


def _installed() -> bool:
    try:
        version("deepspeed")
    except PackageNotFoundError:
        return False
    return True


def _ignored(options: Options, key: str) -> Iterator[Problem]:
    """Stage 1 of bf16 parameters with fp32 gradients has an optimizer of its own in DeepSpeed."""
    if options.stage == 1 and options.offload_optimizer == "none":
        for name in ("overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size"):
            if getattr(options, name) is not None:
                yield Problem(
                    "has no effect in stage 1 where bf16 parameters have fp32 gradients: DeepSpeed sums them once, "
                    "after the window",
                    key=f"{key}.{name}",
                    fix=f"remove it, or {key}.stage=2, or plugins.precision.gradients=bf16",
                )


def fp64_problem(key: str) -> Problem:
    """Its all-reduce takes no fp64 gradients, and its stages 1 to 3 make fp32 masters of whatever they are given."""
    return Problem(
        "DeepSpeed has no fp64: it sums gradients and keeps master weights in fp32 at most",
        key="plugins.precision.compute",
        fix=f"plugins.precision.compute=fp32, or plugins.zero or plugins.ddp in place of {key}",
    )


def fp16_problem(stage: int, key: str) -> Problem:
    """DeepSpeed's fp16 has a loss scale of its own, which it multiplies into a backward that is not its own here."""
    return Problem(
        f"stage {stage} of DeepSpeed scales the loss of an fp16 model itself, in its own backward, and the engine's "
        "backward is another",
        key="plugins.precision.parameters",
        fix=f"plugins.precision.parameters=bf16, or {key}.stage=0, or plugins.zero in place of {key}",
    )


def _options(options: Options, key: str) -> Iterator[Problem]:
    for name, stages in STAGES.items():
        if options.stage not in stages and getattr(options, name) not in (None, "none"):
            yield Problem(
                f"has no effect in stage {options.stage}: it belongs to stage {' and '.join(map(str, stages))}",
                key=f"{key}.{name}",
                fix=f"remove it, or {key}.stage={stages[-1]}",
            )
    if options.offload_optimizer == "nvme" and options.stage:
        yield Problem(
            "stages 1 and 2 of DeepSpeed take nvme for cpu"
            if options.stage < 3
            else "DeepSpeed would keep master weights, moments and gradients in files between uses, where clipping, "
            "checkpoints and other plugins cannot reach them",
            key=f"{key}.offload_optimizer",
            fix=f"{key}.offload_optimizer=cpu; parameters can lie on a disk with {key}.stage=3 "
            f"{key}.offload_parameters=nvme",
        )
    places = (options.offload_optimizer, options.offload_parameters)
    if "nvme" in places and options.nvme_path is None:
        yield Problem(
            "is needed to offload to nvme", key=f"{key}.nvme_path", fix=f"{key}.nvme_path=<folder on a local disk>"
        )
    if "nvme" not in places and options.nvme_path is not None:
        yield Problem("has no effect: nothing is offloaded to nvme", key=f"{key}.nvme_path", fix="remove it")
    if places == ("none", "none") and options.pin_memory is not None:
        yield Problem("has no effect: nothing is offloaded", key=f"{key}.pin_memory", fix="remove it")


def _mesh(context: PlanContext) -> Iterator[Problem]:
    mesh = context.mesh
    for axis in mesh.axes:
        if axis.name in ("pp", "tp", "cp") and axis.degree > 1:
            yield Problem(
                f"DeepSpeed would divide over all {mesh.world_size} ranks, not along dp alone, where {axis.name} has "
                f"degree {axis.degree}",
                key=f"parallel.{axis.key}",
                fix=f"parallel.{axis.key}=1, or plugins.zero in place of plugins.deepspeed",
            )
    if len(mesh.members("dp")) > 1:
        yield Problem(
            "DeepSpeed divides over all data-parallel ranks: hybrid sharding is not offered through it",
            key="parallel.data_parallel_shard",
            fix="remove it, or use plugins.zero in place of plugins.deepspeed",
        )
