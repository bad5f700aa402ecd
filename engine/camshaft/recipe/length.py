"""How long a run is, as far as it is known: in samples and in optimizer steps."""

from __future__ import annotations

from camshaft.recipe.schema import Recipe


def sample_limit(recipe: Recipe, samples_per_epoch: int | None = None) -> int | None:
    """After how many samples the data ends; None if ``max_steps`` ends the run, or nobody says how long an epoch is."""
    training = recipe.training
    if training.max_epochs is not None:
        return None if samples_per_epoch is None else training.max_epochs * samples_per_epoch
    if training.max_tokens is not None:
        return -(-training.max_tokens // recipe.data.sequence_length)
    return None


def total_steps(recipe: Recipe, samples: int | None, global_batch_size: int) -> int:
    """Optimizer steps of the whole run; the last window may be short."""
    if recipe.training.max_steps is not None:
        return recipe.training.max_steps
    assert samples is not None
    return -(-samples // global_batch_size)


def known_steps(recipe: Recipe) -> int | None:
    """Optimizer steps of the whole run; None for epochs, whose length only the data tells."""
    samples = sample_limit(recipe)
    if recipe.training.max_steps is None and samples is None:
        return None
    return total_steps(recipe, samples, recipe.batch.global_batch_size)
