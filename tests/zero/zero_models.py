"""Models whose modules do not run one after the other, or hold odd parameters: changes to a Llama on meta."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from camshaft.models.llama import Decoder


def empty(*shape):
    return nn.Parameter(torch.empty(shape, device="meta"))


class Adds(nn.Module):
    """Adds a vector to what a module returns; ``read`` gets it from wherever it is."""

    def __init__(self, inner, read):
        super().__init__()
        self.inner, self.read = inner, read

    def forward(self, *inputs):
        return self.inner(*inputs) + 0.02 * self.read()


class Looped(Decoder):
    """Runs all layers twice."""

    def forward(self, tokens, positions, document):
        hidden = self.embed_tokens(tokens)
        rope = self.rotary_emb(positions, torch.promote_types(hidden.dtype, torch.float32))
        for layer in (*self.layers, *self.layers):
            hidden = layer(hidden, rope, None)
        return self.norm(hidden)


class CallsBack(nn.Module):
    """A block that calls another block."""

    def __init__(self, inner, other):
        super().__init__()
        self.inner, self.others = inner, [other]  # in a list, so that it is no child of this one

    def forward(self, *inputs):
        return self.inner(*inputs) + 0.1 * self.others[0](*inputs)


class Recomputed(nn.Module):
    """Computes what is inside again in backward, several times one after the other."""

    def __init__(self, inner, times=1, reentrant=False):
        super().__init__()
        self.inner, self.times, self.reentrant = inner, times, reentrant

    def forward(self, hidden, *rest):
        for _ in range(self.times):
            hidden = checkpoint(self.inner, hidden, *rest, use_reentrant=self.reentrant)
        return hidden


class RecomputesLayers(Decoder):
    """Recomputes whole layers from outside of them."""

    def forward(self, tokens, positions, document):
        hidden = self.embed_tokens(tokens)
        rope = self.rotary_emb(positions, torch.promote_types(hidden.dtype, torch.float32))
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, rope, None, use_reentrant=False)
        return self.norm(hidden)


def recomputes_layers(model):
    model.model.__class__ = RecomputesLayers


def recomputes_inside(model):
    for layer in model.model.layers:
        layer.mlp = Recomputed(layer.mlp)


def reentrant(model):
    """Backward makes the gradients of one block's matrices twice."""
    block = model.model.layers[1]
    block.mlp = Recomputed(block.mlp, times=2, reentrant=True)


def reads_ahead(model):
    """The embedding reads weights of blocks that are called later."""
    blocks = list(model.model.layers[1:])
    read = lambda: sum(block.mlp.gate_proj.weight.sum(0) for block in blocks)  # noqa: E731
    model.model.embed_tokens = Adds(model.model.embed_tokens, read)


def reads_back(model):
    """The last norm reads a weight of the first block, which was called before."""
    norm = [model.model.layers[0].input_layernorm]
    model.model.norm = Adds(model.model.norm, lambda: norm[0].weight)


def never_called(model):
    """A module holds a weight that others read, and is never called."""
    model.model.holder = nn.RMSNorm(model.config.hidden_size, device="meta")
    model.model.norm = Adds(model.model.norm, lambda: model.model.holder.weight)


def looped(model):
    model.model.__class__ = Looped


def shared_block(model):
    model.model.layers[2] = model.model.layers[0]


def calls_back(model):
    layers = model.model.layers
    layers[2] = CallsBack(layers[2], layers[0])


def scalars(model):
    """A scalar in a block, and a parameter without elements."""
    block = model.model.layers[1]
    block.scale, model.nothing = empty(), empty(0, 4)
    block.mlp = Adds(block.mlp, lambda: 10 * block.scale)


def only_a_scalar(model):
    """Nothing trains but one element: every rank but one has nothing to update."""
    model.requires_grad_(False)
    scalars(model)


def no_list(model):
    model.model.layers = nn.Sequential(*model.model.layers)


ODD = {
    "reads ahead": reads_ahead,
    "reads back": reads_back,
    "never called": never_called,
    "looped": looped,
    "shared block": shared_block,
    "calls back": calls_back,
    "scalars": scalars,
    "only a scalar": only_a_scalar,
    "no list": no_list,
    "recomputes layers": recomputes_layers,
    "recomputes inside": recomputes_inside,
    "reentrant": reentrant,
}
