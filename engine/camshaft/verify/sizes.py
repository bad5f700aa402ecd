"""Smaller sizes that keep what matters: ratios of heads, divisibility by axes, ties, biases, several buckets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camshaft.models.config import ModelConfig
    from camshaft.plugin import Options

LENGTH = 16
"""Tokens of a sample, or one more where axes do not divide the recipe's."""
VOCABULARY = 96
MOST_HEADS = 8
"""Query heads that share a key head, at most: enough for any ratio to be more than one."""
LEAST_BUCKETS, MOST_BUCKETS = 4, 12
"""How many buckets a model's parameters are cut into, where a recipe has a size of them."""
_MIB = 2**20


def small_model(
    config: ModelConfig, degrees: Mapping[str, int], small: Mapping[str, int], layers: int
) -> dict[str, Any]:
    """The ``model`` section of a model like ``config`` with ``layers`` layers; degrees before and after by axis.

    Kept are: query heads a key head, whether key heads are divided or shared along ``tp``, whether the vocabulary, the
    inner width and the width are divided evenly, powers of two in a head's width up to 8, and every flag.
    """
    tp, cut = degrees.get("tp", 1), small.get("tp", 1)
    keys = 1 if config.num_key_value_heads == 1 or config.num_key_value_heads < tp else max(cut, 2)
    heads = keys * min(config.num_attention_heads // config.num_key_value_heads, MOST_HEADS)
    heads *= 1 if heads % cut == 0 else cut
    head_dim = next((size for size in (8, 4) if config.head_dim % size == 0), 6)
    square = config.hidden_size == config.num_attention_heads * config.head_dim
    hidden = heads * head_dim + (0 if square else 2 * cut)
    hidden += 2 * cut if hidden % 16 == 0 else 0  # sizes that are too round leave no padding in flat buffers
    ratio = min(max(config.intermediate_size / config.hidden_size, 0.5), 3.0)
    inner = as_even(round(hidden * ratio), config.intermediate_size, tp, cut)
    scaling = config.rope_scaling
    return asdict(config) | {
        "vocab_size": as_even(VOCABULARY, config.vocab_size, tp, cut),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": head_dim,
        "rope_scaling": None if scaling is None else scaling.as_dict(),
        "initializer_range": max(config.initializer_range, 0.05),
    }


def as_even(wanted: int, original: int, degree: int, small: int) -> int:
    """A number near ``wanted`` that ``small`` divides exactly where ``degree`` divides ``original``."""
    if original % max(degree, 2):
        return wanted + 1 if wanted % max(small, 2) == 0 else wanted
    return wanted + -wanted % max(small, 2)


def least_layers(original: int, degree: int, small: int) -> int:
    """Layers to begin with: two a stage, and one more where the stages do not divide the recipe's."""
    if small == 1:
        return 2 + original % 2
    return 2 * small + (1 if original % degree else 0)


def small_options(options: Options, shrinkage: float, parameters: int, width: int, steps: int) -> dict[str, Any]:
    """Fields of a plugin's options whose values are sizes or lengths, smaller.

    Sizes in MiB (``..._mb``) and in elements (``...bucket_size``) shrink with the model, and further until
    ``parameters`` elements of ``width`` bytes make several buckets; numbers of steps are cut to half of ``steps``.
    """
    found: dict[str, Any] = {}
    for name in type(options).model_fields:
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            continue
        if name.endswith("_mb"):
            whole = parameters * width / _MIB
            found[name] = float(f"{_between(value * shrinkage, whole):.3g}")
        elif name.endswith("bucket_size"):
            found[name] = max(round(_between(value * shrinkage, parameters)), 1)
        elif name.endswith("_steps") and value > max(steps // 2, 1):
            found[name] = max(steps // 2, 1)
    return found


def _between(size: float, whole: float) -> float:
    return min(max(size, whole / MOST_BUCKETS), whole / LEAST_BUCKETS)


def small_degrees(degrees: Mapping[str, int]) -> dict[str, int]:
    """Two ranks along every axis that has several, or three where their number is odd: not all divides evenly then."""
    return {axis: min(degree, 2 + degree % 2) for axis, degree in degrees.items()}


def accumulations(original: int, pipeline: int) -> list[int]:
    """Microbatches of a window to try, the fewest first; as many as before where they were few."""
    if original <= 3:
        return [original]
    if pipeline == 1:
        return [3]
    return [count for count in (2 * pipeline, 3 * pipeline, 4 * pipeline) if count < original] + [original]
