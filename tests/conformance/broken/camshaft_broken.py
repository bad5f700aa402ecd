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


class PlansByLastRank(Good):
    """Alike on all ranks but the fourth."""

    @hookimpl
    def plan(self):
        return Plan(provides=("fourth",) if os.environ.get("LOCAL_RANK") == "3" else ())


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


class Mislabelled(Scales):
    """Right, and no observer, which it is said to be."""

    @hookimpl
    def reduce_parts(self, state): ...


class ClipsAlone(Good):
    """Takes the norm of what this rank has, which is all of it as long as nobody divides anything."""

    @hookimpl
    def clip(self, state):
        import torch

        gradients = [part.tensor.grad for part in state.world.parts if part.tensor.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([each.norm() for each in gradients]))
        torch._foreach_mul_(gradients, torch.clamp(0.1 / (norm + 1e-6), max=1.0))
        return norm


class Touches(Good):
    """Writes gradients that it did not claim, while they are summed; their values stay."""

    @hookimpl
    def post_backward(self, state):
        for parameter in state.model.parameters():
            parameter.grad.mul_(1.0)


class Writes(Good):
    """Puts a weight back to what it is, but for one bit, on every rank alike."""

    @hookimpl
    def log(self, state):
        state.model.model.norm.weight.data.mul_(1 + 1e-15)


class Forgets(Good):
    @hookimpl
    def load_state_dict(self): ...


class Unsaved(camshaft.Plugin):
    """A rate that falls with the steps of this process, where it should with those of the run."""

    steps = 0

    @hookimpl
    def lr(self, step):
        return 1.0 / (1 + self.steps)

    @hookimpl
    def post_step(self):
        self.steps += 1


class SavesAlone(camshaft.Plugin):
    """Keeps a count that it never takes back."""

    count = 0

    @hookimpl
    def post_step(self):
        self.count += 1

    @hookimpl
    def state_dict(self):
        return {"count": self.count}


class OneRankForgets(Good):
    @hookimpl
    def bind(self, state):
        self.rank = state.world.rank

    @hookimpl
    def load_state_dict(self, entries):
        if self.rank == 0:
            self.count = entries["count"]


class SavingWrites(Good):
    @hookimpl
    def state_dict(self, state):
        for part in state.world.parts:
            part.tensor.data.mul_(1 + 1e-9)
        return {"count": self.count}


class HooksEverything(Good):
    @hookimpl
    def bind(self):
        from torch.nn.modules.module import register_module_forward_hook

        register_module_forward_hook(lambda *arguments: None)


class ChangesClasses(Good):
    """Makes a norm a module of its own class, and leaves it."""

    @hookimpl
    def bind(self, state):
        norm = state.model.model.norm
        norm.__class__ = type("Mine", (type(norm),), {})


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


class CallsExtra(Good):
    """The same, by pluggy's other door."""

    @hookimpl
    def bind(self):
        from camshaft.host import Host

        self.host = Host({"inner": Good()})

    @hookimpl
    def post_backward(self, state):
        self.host.manager.hook.post_step.call_extra([], {"state": state})


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


class KernelsOfSums(Good):
    """A norm that is right alone, and wrong behind the residual's sum."""

    @hookimpl
    def kernels(self):
        from camshaft.ops import Kernel, add_rms_norm, rms_norm

        def off(hidden, residual, weight, eps):
            normed, summed = add_rms_norm(hidden, residual, weight, eps)
            return normed, summed + hidden * 1e-3

        return (Kernel("rms_norm", "off", lambda: {"rms_norm": rms_norm, "add_rms_norm": off}),)


class KernelsOfSteps(Good):
    """A step that forgets the decay."""

    @hookimpl
    def kernels(self):
        from camshaft.ops import Kernel

        def step(parameters, gradients, means, squares, step, *, lr, betas, eps, weight_decay, scale):
            for parameter, gradient, mean, square in zip(parameters, gradients, means, squares, strict=True):
                scaled = gradient if scale is None else gradient * scale
                mean.lerp_(scaled, 1 - betas[0])
                square.mul_(betas[1]).addcmul_(scaled, scaled, value=1 - betas[1])
                root = (square / (1 - betas[1] ** step)).sqrt() + eps
                parameter.sub_(mean / (1 - betas[0] ** step) / root * lr)

        return (Kernel("adamw", "off", lambda: {"updates.adamw": step}),)


class KernelsOfOnesOwn(Good):
    """An operation that nobody but its author knows, beside one that everybody knows."""

    @hookimpl
    def kernels(self):
        from camshaft.ops import Kernel, swiglu

        yield Kernel("swiglu", "mine", lambda: {"swiglu": swiglu})
        yield Kernel("twice", "mine", lambda: {"others.twice": lambda hidden: hidden * 2.0})
