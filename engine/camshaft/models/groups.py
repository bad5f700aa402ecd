"""Parameter groups by role, shared by all optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from camshaft.errors import RecipeError

DECAYING = frozenset({"matrix", "embedding"})


def decay_groups(
    model: Module, roles: Mapping[str, str], weight_decay: float, *, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Parameters that train, once each, in two groups: those whose role decays, then norms and biases.

    A group without parameters is left out. Frozen parameters get no optimizer state.

    Raises:
        RecipeError: nothing trains.
    """
    decaying = DECAYING if decay_embeddings else DECAYING - {"embedding"}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise RecipeError("every parameter of the model is frozen: there is nothing to train")
    split: tuple[list[Any], list[Any]] = ([], [])
    for name, parameter in trained:
        split[roles[name] not in decaying].append(parameter)
    decays = (weight_decay, 0.0)
    return [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in zip(split, decays, strict=True)
        if parameters
    ]
