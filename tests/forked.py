"""Ranks are forked with what every run of them would import again: up to a quarter of what a rank of a test computes.

For tests in a pytest of their own too: ``-p forked``, with this file where it is found.
"""

import os

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
