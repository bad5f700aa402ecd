"""In which order a run calls the hooks: the one table behind the picture and the page of hooks.

``tests/docs/test_run_order.py`` compares it with the calls of a real run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Hooks that are called together; ``core`` is what the core itself makes there."""

    title: str
    hooks: tuple[str, ...]
    core: str = ""


BUILD = Stage(
    "Build",
    (
        "plan", "shapes", "misfits", "activations", "estimate", "precision", "kernels", "rewrite", "build_model",
        "split", "shard_compute", "recompute", "compile_model", "shard_storage", "materialize", "optimizer", "schedule",
        "handlers", "bind",
    ),
)  # fmt: skip
OPEN = Stage("Open", ("load", "load_state_dict", "post_load", "pre_run"))
STEP = (
    Stage("F forward", ("pre_forward", "around_forward"), "loss sum, weight"),
    Stage("B backward", ("post_backward",), "gradients"),
    Stage("REDUCE", ("reduce", "reduce_parts", "post_reduce")),
    Stage("CLIP", ("clip",)),
    Stage("STEP", ("lr", "around_step", "step", "release")),
    Stage("records", ("log",), "at intervals"),
    Stage("done", ("post_step",)),
)
FIRST = Stage("After step 1", ("inert",))
SAVE = Stage("Save", ("save", "state_dict"))
END = Stage("End", ("close",))

PLAN_ONLY = frozenset({"shapes", "misfits", "activations", "estimate"})
"""Hooks that ``camshaft plan`` and what checks a recipe call, and a run that is under way does not."""

RUN_ORDER = tuple(name for stage in (BUILD, OPEN, *STEP, FIRST, SAVE, END) for name in stage.hooks)
