"""What ``train`` shows when it ends: where things are, a sample of text, what to try next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from camshaft.cli.streams import announce

if TYPE_CHECKING:
    from camshaft.data import Prepared
    from camshaft.state import State, World

SAMPLE_TOKENS = 60


def show(state: State, data: Prepared, recipe_path: str, overrides: Sequence[str] = ()) -> None:
    """Print the closing lines; called on rank 0 while the model exists."""
    run = state.world.run
    if speaks(state, data):
        announce(f"\n{sample(state, data)}\n")
    announce(f"run          {run.path}")
    if run.metrics.exists():
        announce(f"metrics      {run.metrics}")
    checkpoints = sorted(path for path in run.checkpoints.glob("step_*") if path.is_dir())
    if checkpoints:
        announce(f"checkpoint   {checkpoints[-1]}")
    announce("try next")
    for line, why in next_steps(state, recipe_path, overrides):
        announce(f"  {line}\n      {why}")


def speaks(state: State, data: Prepared) -> bool:
    """Whether a sample is to be expected: there is a tokenizer, and the model is our own."""
    from camshaft.models.llama import Llama

    return data.tokenizer is not None and isinstance(state.model, Llama)


def sample(state: State, data: Prepared) -> str:
    """A sample of the model under its headline, or in one line why there is none."""
    reason = _divided(state.world)
    if reason is not None:
        return f"no sample of the model: {reason} are divided over ranks"
    text = text_sample(state, data) or "(blanks)"
    return f"sample of the model after step {state.step}:\n  {text}"


def _divided(world: World) -> str | None:
    """What of the model this rank cannot compute with alone: at the end of a run no other one helps."""
    if world.mesh.degree("pp") > 1:
        return "its layers"
    return "its parameters" if world.mesh.degree("tp") > 1 or not world.readable else None


def text_sample(state: State, data: Prepared) -> str:
    """A few words from the model, one line. ``speaks`` holds, and this rank has the whole model."""
    import torch

    from camshaft.models.llama import Llama
    from camshaft.models.sample import generate

    assert data.tokenizer is not None and isinstance(state.model, Llama)
    generator = torch.Generator(device="cpu").manual_seed(state.world.recipe.seed)
    prompt = [int(token) for token in data.tokenizer.encode_batch(["The "])[0]]
    state.model.eval()
    ids = generate(state.model, prompt, SAMPLE_TOKENS, temperature=0.8, top_k=40, generator=generator)
    state.model.train()
    return " ".join(data.tokenizer.decode(ids).split())


def next_steps(state: State, recipe_path: str, overrides: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Commands that make sense after this run, each with its reason; what the user overrode stays overridden."""
    recipe = state.world.recipe

    def line(command: str, *changes: str) -> str:
        return shlex.join([*program(), command, recipe_path, *_without(overrides, changes), *changes])

    steps = []
    if state.world.world_size > 1:
        size = f"batch.global_batch_size={8 * state.world.batch.micro_batch_size}"
        eight = f"{line('plan', 'parallel.data_parallel=auto', size)} --world-size 8"
        steps.append((eight, "who would own what, and do what, on eight ranks"))
    if recipe.training.max_steps is not None:
        steps.append((line("train", f"training.max_steps={2 * recipe.training.max_steps}"), "a new run, twice as long"))
    if state.world.world_size > 1:
        other = "torchrun" if recipe.launch.launcher == "deepspeed" else "deepspeed"
        steps.append((line("train", f"launch.launcher={other}"), "another launcher, same losses"))
    return steps


def program() -> list[str]:
    """What to type for this very program: ``camshaft`` where the shell would find it, else its path."""
    beside = Path(sys.executable).parent / "camshaft"
    found = shutil.which("camshaft")
    if found is not None and Path(found).resolve() == beside.resolve():
        return ["camshaft"]
    if not beside.is_file():
        return [sys.executable, "-m", "camshaft"]
    return [min(str(beside), os.path.relpath(beside), key=len)]


def _without(overrides: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Overrides of other keys; not of the run directory, which holds this run now."""
    changed = {change.partition("=")[0] for change in changes} | {"run.dir"}
    return [override for override in overrides if override.partition("=")[0] not in changed]
