"""Bytes that autograd keeps in real forwards, and bytes of all tensors at the fullest moment of a step."""

import gc
import weakref

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from camshaft.cli.ranks import Ranks
from camshaft.distributed import Environment
from camshaft.host import Host
from camshaft.loop import session
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet


def saved_by(model, batch):
    """Bytes of distinct storages that one forward's graph keeps, without those of parameters and buffers."""
    return _saving(model, model, batch)[1]


def _saving(model, call, batch):
    held = [*model.parameters(), *model.buffers()]
    held += [each.weight for each in model.modules() if hasattr(each, "weight")]  # a tie's copy too
    own = {each.untyped_storage().data_ptr() for each in held}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor.detach()  # the hook must not make the tensor keep its own graph

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        made = call(batch)
    return made, sum(each.nbytes() for each in seen.values())


class Saved(Plugin):
    """Bytes of distinct storages that each forward's graph keeps, without those of parameters and buffers."""

    def __init__(self):
        super().__init__()
        self.forwards = []

    @hookimpl
    def around_forward(self, state, call):
        def forward(batch):
            made, size = _saving(state.model, call, batch)
            self.forwards.append((batch.stage or 0, size))
            return made

        return forward


class Live(TorchDispatchMode):
    """Bytes of storages that are alive, from the operations that make them to their end, and the most so far."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = {}

    def take(self, tensor):
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _gone(self, key, size):
        del self._known[key]
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, list | tuple) else (result,):
            self.take(each)
        return result


def run_counting(rank, world_size, resolved, whole_step):
    """(stage, bytes) of each forward of the first step; or the most bytes at once in the second step."""
    gc.collect()
    gc.freeze()  # what came with the fork is not of this run
    saved, live = Saved(), Live()
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    observers = {} if whole_step else {"saved": saved}
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), observers) as trainer:
        run, steps = trainer.stepper.run, []

        def one(*arguments):
            if not whole_step or not steps:
                steps.append(run(*arguments))
                return
            gc.collect()
            for each in gc.get_objects():
                if issubclass(type(each), torch.Tensor):
                    live.take(each)
                    if each.is_leaf and each.grad is not None:
                        live.take(each.grad)
            live.most = live.now
            with live:
                run(*arguments)

        trainer.stepper.run = one
        trainer.train(Quiet(), Quiet())
    return live.most if whole_step else saved.forwards


def measured(resolved, world_size, *, whole_step=False):
    return run_ranks(world_size, run_counting, resolved, whole_step, timeout_s=120)


def holdings(resolved, world_size):
    checked = check(resolved, world_size, device="cpu").require()
    ranks = Ranks(checked, Host.of(resolved.recipe.plugins))
    return [ranks.holding(rank) for rank in range(world_size)]
