"""Tensor parallel on two ranks: with and without sequence parallel, against torch's ``parallelize_module`` by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.bench import peers, peers_tensor
from tools.bench.setup import Case
from tools.bench.sharded import Entry, Target, joined, measure, only

RANKS = 2
UNTIED = {"tie_word_embeddings": False}
"""A tied table is divided otherwise by torch's plan, which then gathers logits; so neither has one."""
CASES = (
    Case("tp-small", {"preset": "llama-tiny", **UNTIED}, 128, 8, 1, "fp32", steps=3, blocks=15),
    Case("tp-larger", {"preset": "llama-small", **UNTIED}, 128, 4, 1, "fp32", steps=1, blocks=10),
)


def _tensor(**options: Any) -> Entry:
    return Entry(peers.Camshaft, {"tensor_parallel": options}, parallel={"tensor_parallel": RANKS})


def _torch(build: type[peers_tensor.Parallelized]) -> Entry:
    return Entry(build, {"tensor_parallel": {}}, parallel={"tensor_parallel": RANKS})


ENTRIES = {
    "tensor": _tensor(),
    "tensor, sequence": _tensor(sequence_parallel=True),
    "tensor, sequence, async": _tensor(sequence_parallel=True, **{"async": True}),
    "parallelize_module": _torch(peers_tensor.Parallelized),
    "parallelize_module, sequence": _torch(peers_tensor.SequenceParallelized),
}
TARGETS: tuple[Target, ...] = (
    ("tensor", "parallelize_module", 1.0),
    ("tensor, sequence", "parallelize_module, sequence", 1.0),
    ("tensor, sequence, async", "tensor, sequence", 1.0),
)
"""The last says whether the overlap pays."""


def run(blocks: int | None, names: Sequence[str] = (), contestants: Sequence[str] = ()) -> dict[str, Any]:
    """Speed, memory and losses in each case, or those of these names."""
    entries = only(ENTRIES, contestants)
    cases = [case for case in CASES if not names or case.name in names]
    return joined(measure(case, entries, RANKS, blocks, TARGETS) for case in cases)
