"""The architecture as data: a frozen configuration, its size in closed form, and what makes one illegal.

Importing this imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from camshaft.errors import Problem, RecipeError
from camshaft.models.presets import PRESETS
from camshaft.recipe.nodes import show

if TYPE_CHECKING:
    from camshaft.recipe.schema import Model

REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
"""Fields that have no default: a preset gives them, or the recipe does."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 (Hugging Face's ``rope_type: llama3``).

    Wavelengths above ``original_max_position_embeddings / low_freq_factor`` are stretched by ``factor``, those below
    ``original_max_position_embeddings / high_freq_factor`` stay, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def as_dict(self) -> dict[str, Any]:
        """The ``rope_scaling`` block of a Hugging Face ``config.json``."""
        return {"rope_type": "llama3", **{key.name: getattr(self, key.name) for key in fields(self)}}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-family decoder, complete: what ``resolve`` returns. Names are those of Hugging Face's ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False

    @property
    def residual_std(self) -> float:
        """First standard deviation of the projections that write to the residual stream (``o_proj``, ``down_proj``).

        Scaled by 1 / sqrt(number of residual additions), two a layer: Radford et al. 2019 (GPT-2), section 2.3.
        """
        return self.initializer_range / math.sqrt(2 * self.num_hidden_layers)

    def num_parameters(self) -> int:
        """Number of parameters, a tied output projection counted once."""
        hidden, head = self.hidden_size, self.head_dim
        queries, keys = self.num_attention_heads * head, self.num_key_value_heads * head
        attention = 2 * hidden * queries + 2 * hidden * keys
        attention += (queries + 2 * keys) * self.attention_bias + 2 * head * self.qk_norm
        layer = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * hidden + self.num_hidden_layers * layer + hidden

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of the model for one token, forward and backward: 6 N + 12 L H Q T.

        Chowdhery et al. 2022 (PaLM), appendix B: L layers, H heads of width Q, T = ``sequence_length``. Attention
        counts the full T x T square although it is causal, and recomputation does not count. N leaves out an untied
        input table, which is looked up and not multiplied; a tied one is counted once, as the output projection.
        """
        lookup = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        width = self.num_attention_heads * self.head_dim
        attention = 12 * self.num_hidden_layers * width * sequence_length
        return float(6 * (self.num_parameters() - lookup) + attention)


def resolve(model: Model, vocab_size: int | None) -> ModelConfig:
    """Complete the recipe's ``model`` section: preset, then its own fields, then defaults.

    Args:
        model: the section as read.
        vocab_size: size of the tokenizer's vocabulary; ``None`` when the data come without a tokenizer.

    Raises:
        RecipeError: with every problem, each under its key (``model.num_attention_heads``).
    """
    problems: list[Problem] = []
    known = _merge(model, problems)
    _check_heads(known, problems)
    known["vocab_size"] = _vocabulary(known.get("vocab_size"), vocab_size, problems)
    known["rope_scaling"] = _rope_scaling(known.get("rope_scaling"), problems)
    if problems:
        raise RecipeError(problems)
    heads = known["num_attention_heads"]
    known.setdefault("num_key_value_heads", heads)
    known.setdefault("head_dim", known["hidden_size"] // heads)
    return ModelConfig(**known)


def _merge(model: Model, problems: list[Problem]) -> dict[str, Any]:
    given = model.model_dump(exclude_none=True, exclude={"preset"})
    if model.preset is None:
        missing = [name for name in REQUIRED if name not in given]
        if missing:
            problems.append(
                Problem(
                    f"there is no preset, and these fields are missing: {', '.join(missing)}",
                    key="model",
                    fix="give all of them, or start from a preset (model.preset=llama-tiny)",
                )
            )
        return given
    if model.preset not in PRESETS:
        problems.append(_unknown_preset(model.preset))
        return given
    return {**PRESETS[model.preset].model_dump(exclude_none=True), **given}


def _unknown_preset(name: str) -> Problem:
    near = get_close_matches(name.lower(), PRESETS, n=1)
    return Problem(
        f"there is no preset '{name}'" + (f". Did you mean '{near[0]}'?" if near else ""),
        key="model.preset",
        fix=f"use '{near[0]}'" if near else f"use one of {', '.join(PRESETS)}",
    )


def _check_heads(known: Mapping[str, Any], problems: list[Problem]) -> None:
    """Divisibility of width, heads and key/value heads, as far as the fields are known."""
    heads, hidden, head_dim = known.get("num_attention_heads"), known.get("hidden_size"), known.get("head_dim")
    groups = known.get("num_key_value_heads", heads)
    if heads and heads % groups:
        divisors = [number for number in range(1, heads + 1) if heads % number == 0]
        problems.append(
            Problem(
                f"{heads} heads cannot share {groups} key/value heads evenly",
                key="model.num_key_value_heads",
                fix=f"use one of {', '.join(map(str, divisors))}",
            )
        )
    if head_dim is None and heads and hidden and hidden % heads:
        problems.append(
            Problem(
                f"hidden_size {hidden} is not divisible by {heads} heads",
                key="model.num_attention_heads",
                fix="use a number of heads that divides it, or give model.head_dim",
            )
        )
    elif (width := head_dim or (heads and hidden and hidden // heads)) and width % 2:
        problems.append(
            Problem(
                f"a head is {width} wide: rotary embeddings turn pairs, so the width must be even",
                key="model.num_attention_heads" if head_dim is None else "model.head_dim",
                fix=f"set model.head_dim={width + 1}, or another even width",
            )
        )


def _vocabulary(declared: int | None, tokenizer: int | None, problems: list[Problem]) -> int | None:
    if declared is None and tokenizer is None:
        problems.append(
            Problem(
                "neither the recipe nor the preset says how many tokens there are, and the data have no tokenizer",
                key="model.vocab_size",
                fix="set model.vocab_size to the vocabulary of the tokenizer that made the data",
            )
        )
    elif declared is not None and tokenizer is not None and declared < tokenizer:
        problems.append(
            Problem(
                f"{declared} rows are too few for the tokenizer's {tokenizer} tokens",
                key="model.vocab_size",
                fix=f"set model.vocab_size={tokenizer} or more, or use a smaller tokenizer",
            )
        )
    return tokenizer if declared is None else declared


def _rope_scaling(block: Mapping[str, Any] | None, problems: list[Problem]) -> RopeScaling | None:
    if block is None:
        return None
    kind = block.get("rope_type", block.get("type"))
    if kind == "default":
        return None
    key, names = "model.rope_scaling", tuple(field.name for field in fields(RopeScaling))
    if kind != "llama3":
        problems.append(
            Problem(
                f"rope_type {'is missing' if kind is None else f'{kind!r} is not known'}",
                key=key,
                fix="use rope_type: llama3, or rope_type: default for no scaling",
            )
        )
        return None
    before = len(problems)
    usual = "Llama 3.1 has factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0 for 8192 original positions"
    problems += [Problem(f"'{name}' is missing", key=f"{key}.{name}", fix=usual) for name in names if name not in block]
    for name, value in block.items():
        if name in ("rope_type", "type"):
            continue
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f". Did you mean '{near[0]}'?" if near else f"; llama3 has {', '.join(names)}"
            fix = f"write '{near[0]}'" if near else "remove it"
            problems.append(Problem(f"there is no key '{name}'{hint}", key=f"{key}.{name}", fix=fix))
        elif not _positive(value, whole=name == "original_max_position_embeddings"):
            whole = "whole " if name == "original_max_position_embeddings" else ""
            message = f"must be a positive {whole}number, got {show(value)}"
            problems.append(Problem(message, key=f"{key}.{name}", fix=usual))
    if len(problems) > before:
        return None
    if block["high_freq_factor"] <= block["low_freq_factor"]:
        message, fix = "must be above low_freq_factor", "raise it, or lower low_freq_factor"
        problems.append(Problem(message, key=f"{key}.high_freq_factor", fix=fix))
        return None
    if block["factor"] < 1:
        message, fix = f"a factor of {block['factor']:g} would shorten what positions reach", "write 1 or more"
        problems.append(Problem(message, key=f"{key}.factor", fix=fix))
        return None
    return RopeScaling(**{name: block[name] for name in names})


def _positive(value: Any, *, whole: bool) -> bool:
    kinds = (int,) if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf
