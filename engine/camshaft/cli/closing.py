"""What ``train`` shows when it ends: where things are, a sample of text, what to try next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camshaft.cli.streams import announce

if TYPE_CHECKING:
    from camshaft.data import Prepared
    from camshaft.state import State

SAMPLE_TOKENS = 60


def show(state: State, data: Prepared, recipe_path: str) -> None:
    """Print the closing lines; called on rank 0 while the model exists."""
    run = state.world.run
    sample = text_sample(state, data)
    if sample:
        announce(f"\nsample of the model after step {state.step}:\n  {sample}\n")
    announce(f"run          {run.path}")
    announce(f"metrics      {run.metrics}")
    checkpoints = sorted(path for path in run.checkpoints.glob("step_*") if path.is_dir())
    if checkpoints:
        announce(f"checkpoint   {checkpoints[-1]}")
    announce("try next")
    for line, why in next_steps(state, recipe_path):
        announce(f"  {line}\n      {why}")


def text_sample(state: State, data: Prepared) -> str:
    """A few words from the model, one line; empty without a tokenizer, or where this rank holds only a part of it."""
    from camshaft.models.llama import Llama

    if data.tokenizer is None or not isinstance(state.model, Llama) or state.world.mesh.degree("pp") > 1:
        return ""
    import torch

    from camshaft.models.sample import generate

    generator = torch.Generator(device="cpu").manual_seed(state.world.recipe.seed)
    prompt = [int(token) for token in data.tokenizer.encode_batch(["The "])[0]]
    state.model.eval()
    ids = generate(state.model, prompt, SAMPLE_TOKENS, temperature=0.8, top_k=40, generator=generator)
    state.model.train()
    return " ".join(data.tokenizer.decode(ids).split())


def next_steps(state: State, recipe_path: str) -> list[tuple[str, str]]:
    """Commands that make sense after this run, each with its reason."""
    recipe = state.world.recipe
    global_size = 8 * recipe.batch.micro_batch_size
    eight = f"camshaft plan {recipe_path} --world-size 8 batch.global_batch_size={global_size}"
    steps = [(eight, "who would own what, and do what, on eight ranks")]
    if recipe.training.max_steps is not None:
        longer = 2 * recipe.training.max_steps
        steps.append((f"camshaft train {recipe_path} training.max_steps={longer}", "the same run, twice as long"))
    if state.world.world_size > 1:
        other = "torchrun" if recipe.launch.launcher == "deepspeed" else "deepspeed"
        steps.append((f"camshaft train {recipe_path} launch.launcher={other}", "another launcher, same losses"))
    return steps
