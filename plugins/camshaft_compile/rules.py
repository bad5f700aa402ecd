"""What can be compiled where. Pure, without torch."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from camshaft.claims import PlanContext
from camshaft.errors import Problem
from camshaft.models.names import called_names
from camshaft.recipe.length import known_steps
from camshaft_compile import naming

if TYPE_CHECKING:
    from camshaft_compile import Options

SPLIT_BACKWARD = frozenset({"zb_h1", "zbv", "dualpipe_v"})
"""Schedules of the plugin `pipeline` that put weight products off."""
CUDA_GRAPHS = "cudagraphs"
"""The backend that records graphs of torch's own kernels."""


def problems(options: Options, context: PlanContext, key: str) -> Iterator[Problem]:
    """Every fault that is known before anything runs; ``key`` is the plugin's place in the recipe."""
    yield from _of_options(options, context, key)
    yield from _of_names(options, context, key)
    yield from _of_others(context, key)
    if options.backend == "inductor" and context.device != "any":
        missing = missing_tools(context.device)
        if missing is not None:
            yield Problem(
                f"the backend 'inductor' compiles for {context.device} with {missing}",
                key=f"{key}.backend",
                fix="install it, or point to it (CXX for C++, CC for C), or train uncompiled with " + f"{key}=null",
            )


def _of_options(options: Options, context: PlanContext, key: str) -> Iterator[Problem]:
    if options.backend == CUDA_GRAPHS:
        yield from _of_graphs(options, context, f"{key}.backend", f"{key}.backend=inductor")
    if options.backend != "inductor":
        for name in ("mode", "cuda_graphs", "cache_dir"):
            if name in options.model_fields_set:
                yield Problem(
                    f"only inductor reads '{name}', and the backend is '{options.backend}'",
                    key=f"{key}.{name}",
                    fix=f"remove it, or set {key}.backend=inductor",
                )
        return
    if options.cuda_graphs:
        yield from _of_graphs(options, context, f"{key}.cuda_graphs", f"{key}.cuda_graphs=false")


def _of_graphs(options: Options, context: PlanContext, key: str, without: str) -> Iterator[Problem]:
    """Why CUDA graphs cannot be; ``key`` asks for them, and ``without`` would not."""
    reason = None
    if context.device == "cpu":
        reason = "CUDA graphs record launches of CUDA kernels, and this run is on a CPU"
    elif options.dynamic:
        reason = "a CUDA graph has one shape, and `dynamic: true` is for changing ones"
    elif options.mode != "default":
        reason = f"mode '{options.mode}' says that there are no CUDA graphs"
    elif context.mesh["pp"].degree > 1:
        reason = "a replayed CUDA graph writes where it wrote before, and a pipeline holds several microbatches at once"
    if reason is not None:
        yield Problem(reason, key=key, fix=f"set {without}")
    elif _takes_bounds_of_documents(context):
        yield Problem(
            "a CUDA graph has one shape, and attention inside of documents is given one more number for each document "
            "of a batch: nearly every step would record anew",
            key=key,
            fix="set plugins.kernels.document_attention=torch, which takes a mask, or data.document_mask=false, or "
            f"{without}",
        )
    elif (times := _microbatches(context)) > 1:
        # github.com/pytorch/pytorch/issues/169545 (an error) and 96693 (wrong sums).
        yield Problem(
            "autograd takes a gradient that a CUDA graph has made over without a copy, the next microbatch's replay "
            f"writes there again, and a step has, or may come to have, {times} microbatches",
            key=key,
            fix=f"set {without}, or make all that a rank has of a batch one microbatch "
            "(batch.micro_batch_size), without batch.on_out_of_memory=halve",
        )


def _takes_bounds_of_documents(context: PlanContext) -> bool:
    """Whether attention takes them, and not a mask of one shape."""
    data, wishes = context.recipe.data, context.recipe.plugins.get("kernels")
    wish = getattr(wishes, "document_attention", None) or getattr(wishes, "all", None)
    return data.pack and data.document_mask and wish not in (None, "torch")


def _microbatches(context: PlanContext) -> int:
    """Of one step on one rank, as far as the recipe tells; 2 where a microbatch may be halved."""
    batch = context.recipe.batch
    given = batch.micro_batch_size if isinstance(batch.micro_batch_size, int) else batch.global_batch_size
    times = batch.global_batch_size // (given * context.mesh.batch_degree)
    return max(times, 2 if batch.on_out_of_memory == "halve" else 1)


def _of_names(options: Options, context: PlanContext, key: str) -> Iterator[Problem]:
    """Backends and modules that there are not, a folder that is none, and a run that ends before it compiles."""
    yield from naming.backend_faults(options.backend, context.plugins, key.rpartition(".")[2], f"{key}.backend")
    if context.config is not None:
        yield from naming.faults(called_names(context.config), options.modules, f"{key}.modules")
    if options.cache_dir is not None and os.path.isfile(options.cache_dir):  # noqa: PTH113  (any text)
        yield Problem(f"{options.cache_dir} is no folder", key=f"{key}.cache_dir", fix="name a folder, or remove it")
    if known_steps(context.recipe) == 1:
        yield Problem(
            "the run has one step, which is never compiled", key=key, fix=f"lengthen the run, or set {key}=null"
        )


def _of_others(context: PlanContext, key: str) -> Iterator[Problem]:
    plugins = context.recipe.plugins
    schedule = getattr(plugins.get("pipeline"), "schedule", None)
    if schedule in SPLIT_BACKWARD and getattr(plugins.get("pipeline"), "table", None) is None:
        yield Problem(
            f"the schedule '{schedule}' puts the weight products of each linear layer off, and a compiled block has "
            "one backward for all of them",
            key=key,
            fix=f"set plugins.pipeline.schedule=1f1b (or interleaved_1f1b), or {key}=null",
        )
    if getattr(plugins.get("deepspeed"), "stage", None) == 3:
        yield Problem(
            "DeepSpeed's stage 3 gathers parameters by hooks on every module, also inside of compiled blocks",
            key=key,
            fix=f"set plugins.deepspeed.stage=2, or take plugins.zero instead, or {key}=null",
        )
    if getattr(plugins.get("tensor_parallel"), "overlap", False):
        yield Problem(
            "tensor parallel with `async` sends in pieces between products, which cannot be part of one graph",
            key=key,
            fix=f"set plugins.tensor_parallel.async=false, or {key}=null",
        )


def missing_tools(device: str) -> str | None:
    """What inductor needs on ``device`` (cpu or cuda) and this machine lacks; None: nothing."""
    if device == "cuda" and find_spec("triton") is None:
        return "Triton, which is not installed"
    variable, name, language = ("CC", "gcc", "C") if device == "cuda" else ("CXX", "g++", "C++")
    compiler = os.environ.get(variable, name)
    found = [shutil.which(each.split()[0]) for each in (compiler, "clang") if each.split()]
    if not any(found[:1] if device == "cpu" else found):
        return f"a {language} compiler, and there is no '{compiler}' here"
    include = sysconfig.get_path("include")
    if include and not (Path(include) / "Python.h").exists():
        return f"Python's headers, and there is no Python.h in {include}"
    return None
