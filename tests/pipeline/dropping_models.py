"""A decoder that draws random numbers in front of, inside of and behind its layers, with modules and without."""

import torch
import torch.nn.functional as F
from torch import nn

from camshaft.models.layers import Block
from camshaft.models.llama import Decoder, Llama
from camshaft.ops import Ops
from camshaft.plugin import Plugin, hookimpl


class Noisy(nn.Module):
    """Draws in a module of torch, in a function, and from another distribution."""

    def __init__(self, config, ops):
        super().__init__()
        self.block = Block(config, ops)
        self.drop = nn.Dropout(0.3)

    def forward(self, hidden, rope, mask):
        mixed = self.drop(self.block(hidden, rope, mask))
        mixed = F.dropout(mixed, 0.5, self.training)
        if self.training:
            mixed = mixed + 0.02 * torch.randn_like(mixed)
        return hidden + mixed


class Embedding(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table
        self.drop = nn.Dropout(0.1)

    @property
    def weight(self):
        return self.table.weight

    def forward(self, tokens):
        return self.drop(self.table(tokens))


class Norm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        return F.dropout(self.norm(hidden), 0.2, self.training)


class NoisyDecoder(Decoder):
    def __init__(self, config, ops):
        super().__init__(config, ops)
        self.embed_tokens = Embedding(self.embed_tokens)
        self.layers = nn.ModuleList(Noisy(config, ops) for _ in range(config.num_hidden_layers))
        self.norm = Norm(self.norm)


class NoisyLlama(Llama):
    def __init__(self, config, decoder=NoisyDecoder):
        super().__init__(config)
        self.model = decoder(config, Ops())
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class EarlyDecoder(NoisyDecoder):
    """Draws in front of each layer, in the loop over them: whoever runs the layer before has drawn other numbers."""

    def _layers(self, span):
        for layer in super()._layers(span):
            yield layer if not self.training or torch.rand(()) < 2 else nn.Identity()


class Builds(Plugin):
    """Owns ``build_model``."""

    def __init__(self, decoder=NoisyDecoder):
        super().__init__()
        self.decoder = decoder

    @hookimpl
    def build_model(self, config):
        return NoisyLlama(config, self.decoder)
