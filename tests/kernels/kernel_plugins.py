"""Plugins as somebody else would write them: kernels of their own, a model of their own, a rival."""

from __future__ import annotations

from typing import Any

import camshaft
from camshaft.claims import Claim

CALLS: list[str] = []


class Kernels(camshaft.Plugin):
    """Offers a SwiGLU, one that this world lacks what it needs for, and an operation that Camshaft has no name for."""

    @camshaft.hookimpl
    def plan(self) -> camshaft.Plan:
        return camshaft.Plan(provides=("kernel:swiglu/mine", "kernel:swiglu/absent", "kernel:twice/mine"))

    @camshaft.hookimpl
    def kernels(self, world: Any) -> Any:
        from camshaft.ops import Kernel

        yield Kernel("swiglu", "mine", lambda: {"swiglu": _swiglu})
        yield Kernel("swiglu", "absent", lambda: {"swiglu": _swiglu}, lambda world: "its card is not plugged in")
        yield Kernel("twice", "mine", lambda: {"others.twice": _twice})


def _swiglu(gate: Any, up: Any) -> Any:
    import torch.nn.functional as F

    CALLS.append("swiglu")
    return F.silu(gate) * up


def _twice(hidden: Any) -> Any:
    CALLS.append("twice")
    return hidden * 2.0


class Model(camshaft.Plugin):
    """Builds the decoder, with one layer more that uses the operation of its own."""

    @camshaft.hookimpl
    def build_model(self, world: Any, config: Any) -> Any:
        from camshaft.models.llama import Llama

        model = Llama(config, world.ops)
        twice = world.ops.others.get("twice", lambda hidden: hidden + hidden)
        model.model.norm.register_forward_hook(lambda module, arguments, made: twice(made))
        return model


class Deaf(camshaft.Plugin):
    """Builds a model that never looks into the table."""

    @camshaft.hookimpl
    def build_model(self, config: Any) -> Any:
        from camshaft.models.llama import Llama

        return Llama(config)


class Rival(camshaft.Plugin):
    """Replaces the same operation in its own way."""

    @camshaft.hookimpl
    def plan(self) -> camshaft.Plan:
        return camshaft.Plan(claims=(Claim("module.implementation", target="ops.swiglu"),))

    @camshaft.hookimpl
    def rewrite(self, world: Any) -> None:
        world.ops.swiglu = _swiglu
