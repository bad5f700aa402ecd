"""How much Muon keeps, told by the recipe alone. Imports no torch."""

from __future__ import annotations

from camshaft.errors import RecipeError
from camshaft.models.config import ModelConfig, resolve
from camshaft.recipe.schema import Recipe


def moments(recipe: Recipe) -> float | None:
    """Values an element, on the mean: one in hidden matrices, two elsewhere. None where sizes are not known yet."""
    try:
        config = resolve(recipe.model, recipe.tokenizer.vocab_size)
    except RecipeError:
        return None  # whoever checks the model tells what is wrong
    return 2 - hidden_elements(config) / config.num_parameters()


def hidden_elements(config: ModelConfig) -> int:
    """Elements of the layers' matrices."""
    hidden, head = config.hidden_size, config.head_dim
    attention = 2 * hidden * head * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)
