"""What the tests of recomputation share: a decoder with dropout, recipes over it, and the modes."""

from torch import nn

from camshaft.models.layers import Block
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_bit_equal
from camshaft.testing.run import record_ranks

MODEL = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
ADAMW = {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
FULL, SELECTIVE = {"mode": "full"}, {"mode": "selective"}
OFFLOAD = {"mode": "offload", "offload_from_kib": 0.0}
BUDGET = {"budget_bytes": 200_000}
MODES = {
    "full": FULL,
    "selective": SELECTIVE,
    "selective-attention": {"mode": "selective", "save": ["products", "attention"]},
    "budget": BUDGET,
    "offload": OFFLOAD,
    "every-second": {"mode": "full", "every": 2},
    "mlp": {"mode": "selective", "modules": ["model.layers.*.mlp", "model.layers.*.self_attn"]},
}


class WetBlock(Block):
    """A layer with dropout behind attention and MLP."""

    def forward(self, hidden, rope, mask):
        attended = self.drop(self.self_attn(self.input_layernorm(hidden), rope, mask))
        normed, hidden = self.post_attention_layernorm(attended, hidden)
        return hidden + self.late(self.mlp(normed))


class Wet(Llama):
    """The decoder with such layers."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.__class__ = WetBlock
            layer.drop, layer.late = nn.Dropout(0.2), nn.Dropout(0.1)

    def tensor_parallel_plan(self):
        return super().tensor_parallel_plan() | {"model.layers.*.drop": "outer", "model.layers.*.late": "outer"}


class Builds(Plugin):
    """Owns ``build_model``."""

    def __init__(self, kind=Wet, frozen=()):
        super().__init__()
        self.kind, self.frozen = kind, frozen

    @hookimpl
    def build_model(self, config):
        model = self.kind(config)
        for name, parameter in model.named_parameters():
            if any(part in name for part in self.frozen):
                parameter.requires_grad_(False)
        return model


def recipe(make_recipe, world_size=1, recompute=None, *, compute="fp32", model=None, plugins=None, **sections):
    """``recompute``: options of the plugin, None leaves it out; ``plugins`` and sections as in ``make_recipe``."""
    chosen = {**ADAMW, "clip": {"max_norm": 0.1}, "precision": {"compute": compute}, **(plugins or {})}
    if recompute is not None:
        chosen["recompute"] = recompute
    if world_size == 1:
        chosen["ddp"] = None
    sections.setdefault("training", {"max_steps": 2, "log_every": 1})
    return make_recipe(chosen, world_size, model=MODEL | (model or {}), **sections)


def train(make_recipe, world_size=1, recompute=None, *, kind=Wet, frozen=(), **settings):
    resolved = recipe(make_recipe, world_size, recompute, **settings)
    return record_ranks(resolved, world_size, {"builds": Builds(kind, frozen)}, timeout_s=100)


def assert_same(ranks, others):
    """Every rank has in every bit what it has without."""
    for one, other in zip(ranks, others, strict=True):
        assert len(one) >= 2 and any(each is not None for each in one[0].gradients.values())
        assert_bit_equal(one, other)
