"""Models of a user's own: layers with biases, a second norm, dropout before, inside of and after the products."""

import torch
from torch import nn

from camshaft.models.layers import Embedding, Linear, RMSNorm
from camshaft.models.llama import TokenLoss
from camshaft.plugin import Plugin, hookimpl

PLAN = {
    "table": "embedding",
    "blocks.*.mix": "region",
    "blocks.*.mix.pre": "inner",
    "blocks.*.mix.wide": "column",
    "blocks.*.mix.drop": "inner",
    "blocks.*.mix.narrow": "row",
    "blocks.*.mix.post": "outer",
    "blocks.*.mix.late": "outer",
    "head": "logits",
    "loss": "loss",
}


class Mix(nn.Module):
    """A region with a norm and dropouts of its own."""

    def __init__(self, width, inner):
        super().__init__()
        self.pre = RMSNorm(width, eps=1e-6)
        self.wide = Linear(width, inner, 0.1, bias=True)
        self.drop = nn.Dropout(0.2)
        self.narrow = Linear(inner, width, 0.1, bias=True)
        self.post = RMSNorm(width, eps=1e-6)
        self.late = nn.Dropout(0.1)

    def forward(self, hidden):
        return self.late(self.post(self.narrow(self.drop(torch.tanh(self.wide(self.pre(hidden)))))))


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norm = RMSNorm(width, eps=1e-6)
        self.mix = Mix(width, inner)
        self.drop = nn.Dropout(0.15)

    def forward(self, hidden):
        return hidden + self.drop(self.mix(self.norm(hidden)))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.table = Embedding(config.vocab_size, width, 0.1)
        self.blocks = nn.ModuleList(Block(width, config.intermediate_size) for _ in range(2))
        self.head = Linear(width, config.vocab_size, 0.1, bias=True)
        self.loss = TokenLoss()

    def forward(self, batch):
        hidden = self.table(batch.tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.loss(self.head(hidden), batch.labels)


class Builds(Plugin):
    """Owns ``build_model``."""

    def __init__(self, kind=Model, frozen=()):
        super().__init__()
        self.kind, self.frozen = kind, frozen

    @hookimpl
    def build_model(self, config):
        model = self.kind(config)
        freeze(model, self.frozen)
        return model


def freeze(model, names):
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.requires_grad_(False)
