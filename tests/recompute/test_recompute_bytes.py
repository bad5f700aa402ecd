"""The bytes that are printed are those that a rank holds less, measured on the memory itself."""

import logging
import time

import pytest
import torch
import torch.distributed as dist
from recompute_cases import FULL, MODES, Builds, Wet, recipe
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet
from camshaft_recompute.offload import Lane
from camshaft_recompute.trees import address, tensors

pytestmark = pytest.mark.broad


class Living(TorchDispatchMode):
    """Every storage that operations made, with its bytes; those that are gone are told apart."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {address(each) for each in tensors([args, kwargs])}
        for each in tensors(result):
            if address(each) not in given:  # what an operation was given it did not make
                storage = each.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def bytes(self):
        """Of what lives."""
        return sum(size for each, size in self.made.items() if not each.expired())


def settled(living):
    """Bytes of what lives once messages are let go of: a thread of gloo's holds the last one for a moment longer than
    ``wait`` lasts, and for long where it gets no processor (that of the loss, 2 numbers of 4 bytes a token).
    """
    if not dist.is_initialized():
        return living.bytes()
    found = []
    for _ in range(5):
        time.sleep(0.01)
        found.append(living.bytes())
    return min(found)


class Meter(Plugin):
    """Bytes that each forward made and that live when its backward begins; autocast has let go of its copies then."""

    def __init__(self):
        super().__init__()
        self.held, self.extras = [], {}

    @hookimpl
    def around_forward(self, state, call):
        def forward(batch):
            with Living() as living:
                made = call(batch)
            made.register_hook(lambda gradient: self.held.append(settled(living)))
            return made

        return forward

    @hookimpl
    def log(self, record):
        self.extras |= {key: value for key, value in record.items() if "recompute" in key}


def measured(rank, world_size, resolved, observers):
    meter, lines = Meter(), []
    logger = logging.getLogger("camshaft.recompute")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    observers = {**observers, "meter": meter}
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), observers) as trainer:
        trainer.train(Quiet(), Quiet())
    return meter.held, meter.extras, lines


def run(make_recipe, world_size, options, **settings):
    resolved = recipe(make_recipe, world_size, options, **settings)
    return run_ranks(world_size, measured, resolved, {"builds": Builds(Wet)}, timeout_s=100)


GIB = 2**30


@pytest.fixture
def far(monkeypatch):
    """The host's memory is one that no operation makes."""
    monkeypatch.setattr(Lane, "away", lambda self, flat: (flat.numpy().copy(), None))
    monkeypatch.setattr(Lane, "back", lambda self, host: (torch.from_numpy(host).clone(), None))


def compared(make_recipe, world_size, options, **settings):
    """(bytes that each rank holds less, bytes that it told), and lines of rank 0's log."""
    ranks = zip(
        run(make_recipe, world_size, None, **settings), run(make_recipe, world_size, options, **settings), strict=True
    )
    pairs, lines = [], []
    for (without, _, _), (held, extras, told) in ranks:
        assert len(without) == len(held) >= 6
        # Of the last step; a pipeline's messages may be under way beside one microbatch or another.
        less = min(without[-3:]) - min(held[-3:])
        pairs.append((less, extras["plugin/recompute/saved_gib"] * GIB))
        lines.append(told)
    assert all(not each for each in lines[1:]), "rank 0 alone talks"
    return pairs, lines[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_one_process(make_recipe, far, mode, compute):
    ((less, told),), lines = compared(make_recipe, 1, MODES[mode], compute=compute)
    assert less == told > 50_000, "to the byte, where 3 % were asked for"
    assert len(lines) == 1 and f"{told / 1024:.4g} KiB" in lines[0]


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
def test_divided_products(make_recipe, mode, sequence):
    settings = {
        "plugins": {"ddp": None, "tensor_parallel": {"sequence_parallel": sequence}},
        "parallel": {"tensor_parallel": 2},
    }
    pairs, _ = compared(make_recipe, 2, MODES[mode], **settings)
    for less, told in pairs:
        assert less == told > 50_000


def test_stages_tell_of_their_own_layers(make_recipe):
    settings = {
        "plugins": {"ddp": None, "pipeline": {"schedule": "1f1b", "virtual_stages": 1}},
        "parallel": {"pipeline_parallel": 2},
        "model": {"num_hidden_layers": 5},
    }
    pairs, _ = compared(make_recipe, 2, FULL, **settings)
    assert pairs[0][0] != pairs[1][0]
    for less, told in pairs:
        assert less == told > 50_000
