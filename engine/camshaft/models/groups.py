"""Parameter groups by role, shared by all optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from camshaft.errors import RecipeError

if TYPE_CHECKING:
    from camshaft.parts import Parts

DECAYING = frozenset({"matrix", "embedding"})


def decay_groups(parts: Parts, weight_decay: float, *, decay_embeddings: bool = True) -> list[dict[str, Any]]:
    """What is to be updated (``world.parts``) in two groups: that whose role decays, then norms and biases.

    A group without members is left out. Frozen parameters are in none, and get no optimizer state. Where nothing on
    this rank trains, but other ranks have parts of the model too, there is one empty group.

    Raises:
        RecipeError: nothing trains.
    """
    decaying = DECAYING if decay_embeddings else DECAYING - {"embedding"}
    if not len(parts):
        if parts.everyone is not None:
            return [{"params": [], "weight_decay": weight_decay}]
        raise RecipeError("every parameter of the model is frozen: there is nothing to train")
    split: tuple[list[Any], list[Any]] = ([], [])
    for part in parts:
        split[part.role not in decaying].append(part.tensor)
    decays = (weight_decay, 0.0)
    return [{"params": tensors, "weight_decay": decay} for tensors, decay in zip(split, decays, strict=True) if tensors]
