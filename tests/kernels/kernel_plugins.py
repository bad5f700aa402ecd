"""Plugins as somebody else would write them: kernels of their own, a model of their own, a rival."""

from __future__ import annotations

from typing import Any

import camshaft
from camshaft.claims import Claim

CALLS: list[str] = []


class Kernels(camshaft.Plugin):
    """Offers a SwiGLU, one that this world lacks what it needs for, an operation that Camshaft has no name for, a norm
    that knows nothing of residuals, and offers that bring something else than what they are of.
    """

    @camshaft.hookimpl
    def plan(self) -> camshaft.Plan:
        offers = (
            "swiglu/mine",
            "swiglu/absent",
            "swiglu/wrong",
            "twice/mine",
            "twice/bare",
            "rms_norm/mine",
            "rope/none",
        )
        return camshaft.Plan(provides=tuple(f"kernel:{each}" for each in offers))

    @camshaft.hookimpl
    def kernels(self, world: Any) -> Any:
        from camshaft.ops import Kernel

        yield Kernel("swiglu", "mine", lambda: {"swiglu": _swiglu})
        yield Kernel("swiglu", "absent", lambda: {"swiglu": _swiglu}, lambda world: "its card is not plugged in")
        yield Kernel("swiglu", "wrong", lambda: {"swiglu": _swiglu, "rope": _swiglu})
        yield Kernel("twice", "mine", lambda: {"others.twice": _twice})
        yield Kernel("twice", "bare", lambda: {"twice": _twice})
        yield Kernel("rms_norm", "mine", lambda: {"rms_norm": _rms_norm})
        yield Kernel("rope", "none", dict)


def _swiglu(gate: Any, up: Any) -> Any:
    import torch.nn.functional as F

    CALLS.append("swiglu")
    return F.silu(gate) * up


def _rms_norm(hidden: Any, weight: Any, eps: Any) -> Any:
    from camshaft import ops

    CALLS.append("rms_norm")
    return ops.rms_norm(hidden, weight, eps)


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
