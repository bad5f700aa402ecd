"""Models of a user's own that draw random numbers with functions, between regions and inside of them."""

import math

import torch
import torch.nn.functional as F
from tensor_models import Builds
from torch import nn

from camshaft.models.layers import Embedding, Linear, RMSNorm
from camshaft.models.llama import TokenLoss

PLAN = {
    "table": "embedding",
    "blocks.*.attend": "region",
    "blocks.*.attend.[qkv]": "column:4",
    "blocks.*.attend.out": "row:4",
    "blocks.*.mix": "region",
    "blocks.*.mix.wide": "column",
    "blocks.*.mix.narrow": "row",
    "head": "logits",
    "loss": "loss",
}


class Attend(nn.Module):
    """Heads of 4 features; what it drops is [b, heads, s, s], and [b, s, heads, 4]."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (Linear(width, width, 0.1) for _ in range(3))
        self.out = Linear(width, width, 0.1, bias=True)

    def forward(self, hidden):
        q, k, v = (layer(hidden).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1)
        mixed = (F.dropout(scores, 0.3, self.training) @ v).transpose(1, 2)
        return self.out(F.dropout(mixed, p=0.1, training=self.training).flatten(2))


class Mix(nn.Module):
    """Drops features, then what the ranks have summed; without tokens divided that is whole, else a rank's tokens."""

    def __init__(self, width, inner):
        super().__init__()
        self.wide, self.narrow = Linear(width, inner, 0.1), Linear(inner, width, 0.1, bias=True)

    def forward(self, hidden):
        features = torch.tanh(F.dropout(2 * self.wide(hidden), 0.2, self.training, inplace=True))
        features = F.alpha_dropout(features, 0.1, self.training)
        return F.dropout(self.narrow(features), 0.15, self.training)


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(width, eps=1e-6) for _ in range(2))
        self.attend, self.mix = Attend(width), Mix(width, inner)

    def forward(self, hidden):
        hidden = hidden + F.dropout(self.attend(self.norms[0](hidden)), 0.5, self.training)
        hidden = F.dropout1d(hidden, 0.1, self.training)
        mixed = F.alpha_dropout(self.mix(self.norms[1](hidden)), 0.1, self.training)
        if self.training:
            mixed = mixed + 0.01 * torch.randn_like(mixed) * torch.rand(())
            mixed = (
                mixed * torch.bernoulli(torch.full_like(mixed, 0.9)) * (1 + torch.empty_like(mixed).uniform_(0, 0.1))
            )
        return hidden + mixed


class Drawing(nn.Module):
    block = Block

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.table = Embedding(config.vocab_size, width, 0.1)
        self.blocks = nn.ModuleList(self.block(width, config.intermediate_size) for _ in range(2))
        self.head = Linear(width, config.vocab_size, 0.1, bias=True)
        self.loss = TokenLoss()

    def forward(self, batch):
        hidden = self.embedded(batch.tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.loss(self.head(hidden), batch.labels)

    def embedded(self, tokens):
        return F.dropout(self.table(tokens), 0.1, self.training)


class Modules(nn.Module):
    """Attention whose weights and heads are dropped by modules, for which a plan needs styles."""

    def __init__(self, width, inner):
        super().__init__()
        self.attend = Heads(width)

    def forward(self, hidden):
        return hidden + self.attend(hidden)


class Heads(Attend):
    def __init__(self, width):
        super().__init__(width)
        self.scores, self.mixed, self.late = nn.Dropout(0.3), nn.Dropout(0.2, inplace=True), nn.Dropout(0.1)

    def forward(self, hidden):
        q, k, v = (layer(hidden).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = self.scores((q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1))
        return self.late(self.out(self.mixed((scores @ v).transpose(1, 2)).flatten(2)))


class DropsHeads(Drawing):
    block = Modules

    def embedded(self, tokens):
        return self.table(tokens)


class Shared(Heads):
    """Two key/value heads, which ranks may have to share, dropped by a function."""

    def __init__(self, width):
        super().__init__(width)
        self.k, self.v = Linear(width, 8, 0.1), Linear(width, 8, 0.1)

    def forward(self, hidden):
        q, k, v = (layer(hidden).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k = F.dropout(k, 0.3, self.training)
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
        return self.late(self.out((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2)))


class SharesHeads(DropsHeads):
    class block(Modules):
        def __init__(self, width, inner):
            super().__init__(width, inner)
            self.attend = Shared(width)


MODULES = {
    "table": "embedding",
    "blocks.*.attend": "region",
    "blocks.*.attend.[qkv]": "column:4",
    "blocks.*.attend.out": "row:4",
    "blocks.*.attend.scores": "inner",
    "blocks.*.attend.mixed": "inner",
    "blocks.*.attend.late": "outer",
    "head": "logits",
    "loss": "loss",
}
MIX = {
    "table": "embedding",
    "blocks.*.mix": "region",
    "blocks.*.mix.wide": "column",
    "blocks.*.mix.narrow": "row",
    "head": "logits",
    "loss": "loss",
}


def one(draw, where):
    """Owns ``build_model``: a model that draws in one place alone. ``where``: inside, between, or on its logits."""

    class Inner(nn.Module):
        def __init__(self, width, inner):
            super().__init__()
            self.wide, self.narrow = Linear(width, inner, 0.1), Linear(inner, width, 0.1)

        def forward(self, hidden):
            features = torch.tanh(self.wide(hidden))
            return self.narrow(draw(features) if where == "inside" else features)

    class One(nn.Module):
        def __init__(self, width, inner):
            super().__init__()
            self.mix = Inner(width, inner)

        def forward(self, hidden):
            mixed = self.mix(hidden)
            return hidden + (draw(mixed) if where == "between" else mixed)

    class Model(Drawing):
        block = One

        def forward(self, batch):
            hidden = self.table(batch.tokens)
            for block in self.blocks:
                hidden = block(hidden)
            logits = self.head(hidden)
            return self.loss(draw(logits) if where == "logits" else logits, batch.labels)

    return Builds(Model)
