"""Stand-ins: a rank that has all stages of the decoder, and runs them in any legal order."""

import random

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from camshaft.models.llama import Llama
from camshaft.models.stages import LLAMA, Span, stage_of
from camshaft.plugin import Plugin, hookimpl
from camshaft.program import Action, Kind

SPANS = tuple(Span(index, index + 1, 3) for index in range(3))
CLOSING = (Action(Kind.REDUCE), Action(Kind.CLIP), Action(Kind.STEP))


class Picky(nn.Module):
    """Adds a gain to samples with a short document: used by some windows, microbatches and ranks only."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.short = inner, None
        self.gain = nn.Parameter(torch.empty(width, device="meta"))

    def forward(self, *inputs):
        hidden = self.inner(*inputs)
        if not bool(self.short.any()):
            return hidden
        return hidden + 0.02 * self.short[:, None, None].to(hidden.dtype) * self.gain


class PickyLlama(Llama):
    def forward(self, batch):
        lengths = (batch.labels >= 0).sum(1)
        for module in self.modules():
            if isinstance(module, Picky):
                module.short = lengths < 10
        return super().forward(batch)


def change(model, frozen=(), picky=False):
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    if picky:
        model.__class__ = PickyLlama
        model.model.norm = Picky(model.model.norm, model.config.hidden_size)
        model.model.layers[1].mlp = Picky(model.model.layers[1].mlp, model.config.hidden_size)
        model.model.layers[1].unused = nn.Parameter(torch.empty(5, device="meta"))


def legal_order(seed, microbatches, split):
    """A random program of three stages on one rank; with ``split`` some backwards are I and, any time later, W."""
    chooser = random.Random(seed)
    kinds = {(m, s): chooser.random() < 0.6 if split else False for m in range(microbatches) for s in range(3)}
    needs = {}
    for (m, s), halved in kinds.items():
        back = Kind.I if halved else Kind.B
        above = Kind.I if s < 2 and kinds[m, s + 1] else Kind.B
        needs[Action(Kind.F, m, s)] = [Action(Kind.F, m, s - 1)] if s else []
        needs[Action(back, m, s)] = [Action(Kind.F, m, s), *([Action(above, m, s + 1)] if s < 2 else [])]
        if halved:
            needs[Action(Kind.W, m, s)] = [Action(Kind.I, m, s)]
    done = []
    while len(done) < len(needs):
        able = [action for action in needs if action not in done and all(each in done for each in needs[action])]
        done.append(chooser.choice(able))
    return done


class Staged(Plugin):
    """Owns ``build_model``, ``split``, ``schedule`` and ``handlers``: three stages on this rank."""

    def __init__(self, program, shared=True, **changes):
        super().__init__()
        self.program, self.shared, self.changes = program, shared, changes
        self.live, self.handed, self.back, self.kept = {}, {}, {}, {}

    @hookimpl
    def build_model(self, config):
        model = Llama(config)
        change(model, **self.changes)
        return model

    @hookimpl
    def split(self, world, model):
        model.spans = dict(enumerate(SPANS))
        names = [name for name, _ in model.named_parameters(remove_duplicate=not self.shared)]
        world.stages = {name: stage_of(name, SPANS, LLAMA) for name in names}
        return model

    @hookimpl
    def schedule(self):
        return (*self.program, *CLOSING)

    @hookimpl
    def handlers(self, state):
        self.state = state
        self.parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        return {Kind.F: self.forward, Kind.B: self.backward, Kind.I: self.inputs, Kind.W: self.weights}

    def forward(self, action):
        _, microbatch, stage = action
        hidden = self.handed.pop((microbatch, stage), None)
        made = self.state.strokes.forward(action, hidden)
        if stage == 2:
            self.state.strokes.count(made)
        else:
            self.handed[microbatch, stage + 1] = made.detach().requires_grad_(made.requires_grad)
        edge = get_gradient_edge(made) if made.requires_grad else None
        self.live[microbatch, stage] = (hidden, edge, made.detach())

    def begin(self, action):
        _, microbatch, stage = action
        hidden, edge, made = self.live.pop((microbatch, stage))
        self.state.strokes.begin_backward(action)
        entering = self.state.strokes.scale(made) if stage == 2 else self.back.pop((microbatch, stage))
        return hidden, edge, entering

    def backward(self, action):
        hidden, edge, entering = self.begin(action)
        if edge is not None:
            torch.autograd.backward(edge, entering)
        self.hand_back(action, hidden, None if hidden is None else hidden.grad)
        self.state.strokes.end_backward()

    def inputs(self, action):
        hidden, edge, entering = self.begin(action)
        wanted = [*self.parameters, *([hidden] if hidden is not None and hidden.requires_grad else [])]
        found = torch.autograd.grad(edge, wanted, entering, allow_unused=True)
        kept = [(leaf, each) for leaf, each in zip(self.parameters, found, strict=False) if each is not None]
        self.kept[action.microbatch, action.stage] = kept
        self.hand_back(action, hidden, found[-1] if len(found) > len(self.parameters) else None)

    def weights(self, action):
        self.state.strokes.begin_backward(action)
        kept = self.kept.pop((action.microbatch, action.stage))
        if kept:
            leaves, gradients = zip(*kept, strict=True)
            torch.autograd.backward(leaves, gradients)
        self.state.strokes.end_backward()

    def hand_back(self, action, hidden, gradient):
        if hidden is not None:
            self.back[action.microbatch, action.stage - 1] = gradient
            hidden.grad = None
