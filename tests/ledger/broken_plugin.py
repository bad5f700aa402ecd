"""A plugin whose rank 1 (or another) makes other calls than its peers, and a run that tells how it was found out."""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from camshaft import Plugin, ending, hookimpl
from camshaft.testing.run import record_rank

STEP = 3
"""The step, from 1, in which it goes wrong."""


class Broken(Plugin):
    """Three calls in each reduction; the second one is what ``rank`` does wrong, as ``kind`` says."""

    def __init__(self, kind, rank=1, step=STEP, folder=None):
        super().__init__()
        self.kind, self.rank, self.step, self.folder = kind, rank, step, folder

    @hookimpl
    def bind(self, state):
        mesh = state.world.mesh
        self.line = mesh.channel("x", "dp")
        self.other = mesh.channel("x", "dp_shard") if "dp_shard" in mesh.shape.names else None

    @hookimpl
    def pre_forward(self, state):
        if self.kind == "slow" and self._now(state):
            time.sleep(8)

    @hookimpl
    def reduce(self, state):
        self.line.all_reduce(torch.ones(5), "reduce").wait()
        self._second(self.kind if self._now(state) else "right")
        if self.kind != "last":
            self.line.all_reduce(torch.ones(20), "reduce").wait()

    def _now(self, state):
        now = state.step + 1 == self.step and state.world.rank == self.rank
        if now and self.folder is not None:
            Path(self.folder, "began").write_text(str(time.time()))
        return now

    def _second(self, kind):
        if kind == "op":
            self.line.broadcast(torch.ones(10), 0, "reduce").wait()
        elif kind == "axis":
            self.other.all_reduce(torch.ones(10), "reduce").wait()
        elif kind == "size":
            self.line.all_reduce(torch.ones(11), "reduce").wait()
        elif kind == "dtype":
            self.line.all_reduce(torch.ones(10, dtype=torch.float64), "reduce").wait()
        elif kind == "gather":
            self.line.all_gather(torch.ones(11 * self.line.size), torch.ones(11), "reduce").wait()
        elif kind == "hook":
            self.line.all_reduce(torch.ones(10), "clip").wait()
        elif kind == "extra":
            self.line.all_reduce(torch.ones(10), "reduce").wait()
            self.line.all_reduce(torch.ones(7), "reduce").wait()
        elif kind not in ("skip", "last", "raw"):
            self._right()

    def _right(self):
        if self.kind == "raw":
            dist.all_reduce(torch.ones(10))
        elif self.kind == "gather":
            self.line.all_gather(torch.ones(10 * self.line.size), torch.ones(10), "reduce").wait()
        else:
            self.line.all_reduce(torch.ones(10), "reduce").wait()


def run(rank, world_size, resolved, kind, folder, wrong=1, step=STEP, board=True):
    """Train one rank; what ended it goes into ``folder/<rank>`` with the time. Returns the number of steps."""

    def note(error):
        Path(folder, str(rank)).write_text(json.dumps([type(error).__name__, str(error), time.time()]))

    def ended(error):
        note(error)
        os._exit(error.exit_status)

    if not board:
        from camshaft_ledger import board as shared

        shared._mapped = lambda path, size: None
    ending.register(ended)
    try:
        return len(record_rank(rank, world_size, resolved, {"x": Broken(kind, wrong, step, folder)}))
    except BaseException as error:
        note(error)
        raise
