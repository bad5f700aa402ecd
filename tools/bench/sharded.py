"""ZeRO 1, 2, 3 against torch and DeepSpeed, interleaved in one run: overhead on one rank, speed and memory on two."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camshaft.data import prepare
from tools.bench import peers, peers_deepspeed
from tools.bench.peers import Job
from tools.bench.processes import Block, Build, Ranks, alive
from tools.bench.setup import Case, median_ratio, recipe_of, scratch

SMALL: dict[str, object] = {
    "preset": "llama-tiny",
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 48,
}
"""8 million parameters: 32 MB of gradients, more than one bucket."""

CASES = (
    Case("tiny", {"preset": "llama-tiny"}, 128, 8, 1, "bf16", steps=4, blocks=40),
    Case("tiny-accumulated", {"preset": "llama-tiny"}, 128, 4, 4, "bf16", steps=2, blocks=40),
    Case("small", SMALL, 256, 4, 1, "bf16", steps=1, blocks=40),
    Case("small-short", SMALL, 128, 1, 1, "bf16", steps=2, blocks=40),
    Case("larger", {"preset": "llama-small"}, 128, 4, 1, "bf16", steps=1, blocks=30),
)
OVERHEAD = (
    Case("one-microbatch", {"preset": "llama-nano"}, 32, 1, 1, "fp32", steps=25, blocks=60),
    Case("four-microbatches", {"preset": "llama-nano"}, 32, 1, 4, "fp32", steps=10, blocks=60),
)
LOSS_GAP = {"fp32": 1e-4, "bf16": 2e-3}
"""Largest relative difference of losses after the first block; bf16 rounds where sums are taken in another order."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One contestant."""

    build: Build
    divided_by: dict[str, Any] | None = None
    group: bool = True
    """Whether it wants a process group with one rank too."""
    parallel: dict[str, int] | None = None


def _zero(**options: Any) -> Entry:
    return Entry(peers.Camshaft, {"zero": options}, group=False)


OURS = {
    "zero 1": _zero(stage=1),
    "zero 2": _zero(stage=2),
    "zero 3": _zero(stage=3),
    "zero 3, keeping": _zero(stage=3, reshard_after_forward=False),
}
PEERS = {
    "DDP": Entry(peers.Ddp),
    "DDP, freed memory kept": Entry(peers.KeptDdp),
    "ZeroRedundancyOptimizer": Entry(peers.ZeroRedundancy),
    "fully_shard, keeping": Entry(peers.FullyShardKeep),
    "fully_shard": Entry(peers.FullyShard),
    "fully_shard, keeping, bf16 gathers": Entry(peers.NarrowFullyShardKeep),
    "fully_shard, bf16 gathers": Entry(peers.NarrowFullyShard),
    "DeepSpeed 1": Entry(peers_deepspeed.DeepSpeed),
    "DeepSpeed 2": Entry(peers_deepspeed.DeepSpeed2),
    "DeepSpeed 3": Entry(peers_deepspeed.DeepSpeed3),
}
BARE = "bare loop"
_VARIANTS = ("DDP, freed memory kept", "fully_shard, keeping, bf16 gathers", "fully_shard, bf16 gathers")
"""Of peers, only raced on two ranks."""
ALONE = {BARE: Entry(peers.Bare, group=False), **OURS} | {k: v for k, v in PEERS.items() if k not in _VARIANTS}
TOGETHER = {**OURS, **PEERS}

Target = tuple[str, str, float]
"""(ours, peer, our speed over its, at least). Peak memory: not above the same peer's."""
SPEED_TARGETS: tuple[Target, ...] = (
    ("zero 1", "DDP", 1.0),
    ("zero 1", "ZeroRedundancyOptimizer", 1.0),
    ("zero 2", "fully_shard, keeping", 1.1),
    ("zero 3, keeping", "fully_shard, keeping", 1.1),
    ("zero 3", "fully_shard", 1.1),
    ("zero 1", "DeepSpeed 1", 1.2),
    ("zero 2", "DeepSpeed 2", 1.2),
    ("zero 3", "DeepSpeed 3", 1.2),
)
OVERHEAD_TARGETS_US = {"zero 1": 0.0, "zero 2": 0.0, "zero 3": 1000.0}
"""Added to a step of the bare loop, at most."""


def only(entries: Mapping[str, Entry], names: Sequence[str], always: Sequence[str] = ()) -> dict[str, Entry]:
    """The contestants of these names, or all; those of ``always`` too."""
    return {name: entry for name, entry in entries.items() if not names or name in names or name in always}


def jobs(entry: Entry, case: Case, world_size: int, folder: Path) -> list[Job]:
    """One job a rank, over a recipe and a run directory of the contestant's own."""
    folder.mkdir()
    resolved = recipe_of(case, world_size, folder, entry.divided_by, entry.parallel)
    prepare(resolved)
    return [Job(resolved, case, rank, world_size) for rank in range(world_size)]


def race(case: Case, entries: Mapping[str, Entry], world_size: int, blocks: int) -> dict[str, dict[str, Any]]:
    """Time every contestant in short blocks, one after another, in an order that turns from round to round.

    Raises:
        AssertionError: the losses after the first block differ: not the same work.
    """
    with scratch() as folder, ExitStack() as stack:
        runners: dict[str, Ranks] = {}
        tokens: dict[str, int] = {}
        for index, (name, entry) in enumerate(entries.items()):
            work = jobs(entry, case, world_size, folder / str(index))
            ranks = stack.enter_context(alive(name, work, entry.build, entry.group or world_size > 1))
            ranks.ask("build")
            runners[name] = ranks
            tokens[name] = work[0].resolved.recipe.batch.global_batch_size * case.sequence_length
        found = _rounds(runners, case.steps, blocks)
        _check_losses({name: measured[0].loss for name, measured in found.items()}, LOSS_GAP[case.compute])
        return {
            name: {
                "times": [block.seconds for block in measured[1:]],  # the first warms up
                "first_loss": measured[0].loss,
                "last_loss": measured[-1].loss,
                "tokens": tokens[name],
                "idle_cpu_ms": 1e3 * statistics.median(block.idle_cpu_s for block in measured[1:]),
                "resident_mb": max(runners[name].ask("resident")) / 2**20,
            }
            for name, measured in found.items()
        }


def _rounds(runners: Mapping[str, Ranks], steps: int, blocks: int) -> dict[str, list[Block]]:
    names, found = list(runners), {name: list[Block]() for name in runners}
    for block in range(blocks + 1):
        turn = block % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(runners[name].steps(steps))
    return found


def _check_losses(losses: Mapping[str, float], gap: float) -> None:
    middle = statistics.median(losses.values())
    far = {name: loss for name, loss in losses.items() if not abs(loss - middle) <= gap * middle}
    assert not far, f"not the same work: losses {far} are over {gap} from the others' {middle}"


def tensor_peaks(case: Case, entries: Mapping[str, Entry], world_size: int) -> dict[str, float]:
    """Peak of torch's CPU tensors of the fullest rank in MiB, each contestant in fresh ranks, three steps."""
    found = {}
    for name, entry in entries.items():
        with scratch() as folder:
            work = jobs(entry, case, world_size, folder / "0")
            with alive(name, work, entry.build, entry.group or world_size > 1) as ranks:
                found[name] = max(ranks.ask("tensors", 3)) / 2**20
    return found


def run(blocks: int | None, names: Sequence[str] = (), contestants: Sequence[str] = ()) -> dict[str, Any]:
    """Speed and memory on two ranks, for each case or those of these names."""
    chosen_cases = [case for case in CASES if not names or case.name in names]
    return joined(measure(case, only(TOGETHER, contestants), 2, blocks, SPEED_TARGETS) for case in chosen_cases)


def joined(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Rows and targets of several cases."""
    results = list(found)
    return {key: [row for each in results for row in each[key]] for key in ("rows", "targets")}


def measure(
    case: Case, entries: Mapping[str, Entry], world_size: int, blocks: int | None, wanted: Sequence[Target]
) -> dict[str, Any]:
    """Speed and peak memory of every contestant in one case, and which of the targets are met."""
    measured = race(case, entries, world_size, blocks or case.blocks)
    peaks = tensor_peaks(case, entries, world_size)
    rows = [_row(case, name, values, peaks[name]) for name, values in measured.items()]
    return {"rows": rows, "targets": speed_targets(case.name, {row["contestant"]: row for row in rows}, wanted)}


def _row(case: Case, name: str, values: dict[str, Any], peak: float) -> dict[str, Any]:
    times = values.pop("times")
    return {
        "case": case.name,
        "contestant": name,
        "step_ms": statistics.median(times) * 1e3,
        "tokens_per_s": values.pop("tokens") / statistics.median(times),
        "tensors_mb": peak,
        "blocks": len(times),
        "steps_per_block": case.steps,
        **values,
    }


def speed_targets(case: str, rows: Mapping[str, Mapping[str, Any]], wanted: Sequence[Target]) -> list[dict[str, Any]]:
    """Our speed and peak memory over each peer's, and whether that is enough."""
    found = []
    for ours, peer, least in wanted:
        if ours in rows and peer in rows:
            speed = rows[peer]["step_ms"] / rows[ours]["step_ms"]
            memory = rows[ours]["tensors_mb"] / rows[peer]["tensors_mb"]
            found.append(
                {
                    "case": case,
                    "ours": ours,
                    "peer": peer,
                    "speed": speed,
                    "wanted": least,
                    "memory": memory,
                    "met": speed >= least and memory <= 1.0,
                }
            )
    return found


def run_overhead(
    blocks: int | None, names: Sequence[str] = (), contestants: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Microseconds that each contestant adds to a step of the bare loop: one rank, a model of almost no work."""
    rows = []
    for case in (case for case in OVERHEAD if not names or case.name in names):
        measured = race(case, only(ALONE, contestants, always=(BARE,)), 1, blocks or case.blocks)
        base = measured[BARE]["times"]
        rows += [_overhead(case, name, values, base) for name, values in measured.items()]
    return rows


def _overhead(case: Case, name: str, values: Mapping[str, Any], base: Sequence[float]) -> dict[str, Any]:
    times = values["times"]
    over = statistics.median(one - other for one, other in zip(times, base, strict=True)) * 1e6
    target = OVERHEAD_TARGETS_US.get(name)
    return {
        "case": case.name,
        "contestant": name,
        "step_us": statistics.median(times) * 1e6,
        "over_bare_us": over,
        "ratio_of_medians": median_ratio(times, list(base)),
        "target_us": target,
        "met": None if target is None else over <= target,
        "blocks": len(times),
        "steps_per_block": case.steps,
        **{key: value for key, value in values.items() if key not in ("times", "tokens")},
    }
