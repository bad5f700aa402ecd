"""Ranks are forked with what every run of them would import again: up to a quarter of what a rank of a test computes.

For tests in a pytest of their own too: ``-p forked``, with this file where it is found.
"""

import contextlib
import functools
import os
from pathlib import Path

import torch.distributed as dist

from camshaft import loop
from camshaft.testing import ranks

ranks.FORKED_WITH += [
    "tokenizers",
    "torch.distributed.checkpoint",
    "camshaft.contracts",
    "camshaft_checkpoint.resuming",
    "camshaft_checkpoint.saving",
    "camshaft_clip.norm",
    "camshaft_ddp.reducer",
    "camshaft_pipeline.executor",
    "camshaft_pipeline.outside",
    "camshaft_pipeline.ties",
    "camshaft_precision.policy",
    "camshaft_tensor_parallel.install",
    "camshaft_tensor_parallel.sharding",
    "camshaft_zero.native",
]

_keep, _parent = loop.keep_freed_memory, os.getpid()


def _keep_in_ranks() -> bool:
    """Not in the process that forks: all that it keeps would be in every rank's page tables."""
    return os.getpid() != _parent and _keep()


loop.keep_freed_memory = _keep_in_ranks


def _set_aside():
    """Let every thread of this rank but the main one run only where nobody else wants the processor."""
    for thread in Path("/proc/self/task").glob("*"):
        if int(thread.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended, or the system does not let us
                os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def _aside(make):
    """Gloo's threads spin while another thread, which may have lost its processor, holds the lock of a connection.

    With more ranks than processors that takes much of all processor time.
    """

    @functools.wraps(make)
    def made(*arguments, **keywords):
        group = make(*arguments, **keywords)
        if os.getpid() != _parent:
            _set_aside()
        return group

    return made


if hasattr(os, "SCHED_IDLE"):
    for _name in ("init_process_group", "new_group"):
        setattr(dist, _name, _aside(getattr(dist, _name)))
