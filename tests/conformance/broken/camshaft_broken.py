"""Plugins that each break one promise, and one that keeps all of them."""

from __future__ import annotations

import os
import threading

from pydantic import BaseModel

import camshaft
from camshaft import Claim, Plan, hookimpl


class Good(camshaft.Plugin):
    """Counts steps, and keeps the count."""

    count = 0

    @hookimpl
    def post_step(self):
        self.count += 1

    @hookimpl
    def state_dict(self):
        return {"count": self.count}

    @hookimpl
    def load_state_dict(self, entries):
        self.count = entries["count"]


class OpenBlock(BaseModel):
    """Takes any key."""

    size: int = 1


class OpenOptions(Good):
    class Options(camshaft.Options):
        block: OpenBlock = OpenBlock()


class PlansByRank(Good):
    @hookimpl
    def plan(self):
        return Plan(provides=(f"rank{os.environ.get('RANK')}",))


class PlansByTurn(Good):
    turns = []

    @hookimpl
    def plan(self):
        self.turns.append(1)
        return Plan(provides=(f"turn{len(self.turns)}",))


class PlansWithTorch(Good):
    @hookimpl
    def plan(self):
        import torch

        return Plan(provides=(torch.__version__,))


class Misspelt(Good):
    @hookimpl
    def post_stepp(self): ...


class Scales(Good):
    """A factor that Adam hides."""

    @hookimpl
    def plan(self):
        return Plan(claims=(Claim("gradient.layout", "dp"),))

    @hookimpl
    def reduce_parts(self, state):
        for parameter in state.model.parameters():
            parameter.grad.mul_(1 + 1e-9)


class Writes(Good):
    """Puts a weight back to what it is, but for one bit, on every rank alike."""

    @hookimpl
    def log(self, state):
        state.model.model.norm.weight.data.mul_(1 + 1e-15)


class Forgets(Good):
    @hookimpl
    def load_state_dict(self): ...


class LeavesHooks(Good):
    @hookimpl
    def bind(self, state):
        state.model.model.norm.register_forward_hook(lambda *arguments: None)


class LeavesThreads(Good):
    @hookimpl
    def bind(self):
        threading.Thread(target=threading.Event().wait, args=(30,), daemon=True, name="stays").start()


class CallsPluggy(Good):
    """Goes through pluggy in each step."""

    @hookimpl
    def bind(self, state):
        from camshaft.host import Host

        self.host = Host({"inner": Good()})

    @hookimpl
    def post_backward(self, state):
        self.host.manager.hook.post_step(state=state)


class OneRank(Good):
    """Sums gradients only of what this rank used."""

    @hookimpl
    def plan(self):
        return Plan(claims=(Claim("gradient.reduce", "dp"),))

    @hookimpl
    def reduce(self, state):
        channel = state.world.mesh.channel(self.name, "dp")
        for parameter in state.model.parameters():
            if channel is not None and parameter.requires_grad:
                if parameter.grad is None:
                    import torch

                    parameter.grad = torch.zeros_like(parameter)
                channel.all_reduce(parameter.grad, "reduce").wait()


class Kernels(Good):
    """Forgets the derivative of the gate."""

    @hookimpl
    def kernels(self):
        from camshaft.ops import Kernel, swiglu

        return (Kernel("swiglu", "wrong", lambda: {"swiglu": lambda gate, up: swiglu(gate.detach(), up) + 0 * gate}),)
