"""One device, a model of one billion parameters: ours with everything that makes it fast, beside plain PyTorch.

Every contestant has a process of its own and the same samples and first values. On a GPU they run one after another,
because two of them do not fit into its memory together; a row is told when it is there, and a contestant that fails
(out of memory, say) has a row that says so. On a machine without a GPU the same code runs a tiny model on the CPU in
alternating blocks, which shows that it works and nothing else.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.utils import clip_grad_norm_

from camshaft.data import prepare
from camshaft.datasheet import peak as peak_rate
from camshaft.models.config import ModelConfig
from camshaft.models.init import materialize
from camshaft.models.llama import Llama
from camshaft.recipe import Resolved, check, load
from tools.bench.peers import Camshaft, Contestant, Job
from tools.bench.processes import Block, Build, alive
from tools.bench.setup import ADAMW, MAX_NORM, Case, plain_loader, plain_optimizer, scratch

ONE_B: dict[str, object] = {"preset": "llama-1b", "vocab_size": 32_000, "max_position_embeddings": 4096}
TINY: dict[str, object] = {"preset": "llama-nano"}
FASTEST: dict[str, Any] = {"kernels": {"all": "auto"}, "compile": {}}
SAVING: dict[str, Any] = {**FASTEST, "recompute": {"mode": "selective"}}
OURS, FP8, LEAN = "Camshaft", "Camshaft, fp8", "Camshaft, selective recompute"
PLAIN, EAGER = "PyTorch, compiled", "PyTorch"
NAMES = (OURS, LEAN, PLAIN, EAGER, FP8)
TARGETS = {"mfu": 0.55, "speed": 1.05, "fp8": 1.2, "memory": 0.7}
"""MFU of ours; ours over the better of PyTorch's; fp8 over ours in bf16; peak memory of the lean one over PyTorch's,
plain and compiled."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a benchmark of one device runs on."""

    kind: str
    case: Case

    @classmethod
    def here(cls) -> Device:
        """This machine's GPU with the large model, else its CPU with the tiny one. Makes no context on a GPU."""
        if torch.cuda.device_count():
            return cls("cuda", Case("1B", ONE_B, 4096, 4, 1, "bf16", steps=5, blocks=8))
        return cls("cpu", Case("tiny", TINY, 64, 2, 1, "bf16", steps=2, blocks=2))


def recipe(device: Device, folder: Path, plugins: dict[str, Any], compute: str) -> Resolved:
    """The recipe of one of our contestants."""
    case = device.case
    tree = {
        "schema_version": 1,
        "name": case.name,
        "model": case.model,
        "tokenizer": {"type": "bpe", "vocab_size": 1024},
        "data": {"train": "python-docs", "sequence_length": case.sequence_length, "document_mask": False},
        "batch": {"micro_batch_size": case.micro_batch_size, "global_batch_size": case.micro_batch_size},
        "training": {"max_steps": 1_000_000, "log_every": 1_000_000},
        "launch": {"device": device.kind, "processes": 1},
        "run": {"dir": str(folder / "run")},
        "plugins": {
            **plugins,
            "adamw": ADAMW,
            "clip": {"max_norm": MAX_NORM},
            "precision": {"compute": compute},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load(path, world_size=1)


class Plain:
    """A loop as PyTorch's documentation shows it: autocast, fused AdamW, and ``torch.compile`` of the model."""

    def __init__(self, device: str, compiled: bool, job: Job) -> None:
        config = check(job.resolved, 1).require().config
        assert config is not None
        with torch.device("meta"):
            self.model: Any = Llama(config)
        materialize(self.model, seed=job.resolved.recipe.seed, device=torch.device(device), dtype=torch.float32)
        self.optimizer = plain_optimizer(self.model)
        self.loader = plain_loader(job.resolved, 0, 1)
        self._device = device
        self._call: Any = torch.compile(self.model) if compiled else self.model

    def steps(self, count: int) -> float:
        """Run ``count`` windows; returns the last loss, per token."""
        loss, weight = torch.zeros(()), 1
        for _ in range(count):
            window = self.loader.next()
            assert window is not None
            (batch,) = window.batches
            batch, weight = batch.to(torch.device(self._device)), window.weight
            with torch.autocast(self._device, dtype=torch.bfloat16):
                loss = self._call(batch)
            (loss / weight).backward()
            clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach()) / weight

    def close(self) -> None:
        """Stop the loader's thread."""
        self.loader.close()


class Peaked:
    """A contestant that waits for its device, and whose largest memory there is told."""

    def __init__(self, build: Build, device: str, job: Job) -> None:
        self._cuda = device == "cuda"
        self._inner: Contestant = build(job)
        self._most = 0

    def steps(self, count: int) -> float:
        """Run ``count`` windows and wait for the device."""
        loss = self._inner.steps(count)
        if self._cuda:
            torch.cuda.synchronize()
        return loss

    def peak(self) -> tuple[int, int, str]:
        """(Most bytes of tensors so far, since this was asked before, the device's own name); no bytes on a CPU."""
        if not self._cuda:
            return 0, 0, "CPU"
        last = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._most = max(last, self._most)
        return self._most, last, torch.cuda.get_device_name()

    def close(self) -> None:
        """Close what is inside."""
        self._inner.close()


def contestants(device: Device) -> dict[str, tuple[dict[str, Any], str, Build]]:
    """Name to plugins, precision and what builds it; fp8 only where the device has it."""
    found: dict[str, tuple[dict[str, Any], str, Build]] = {
        OURS: (FASTEST, "bf16", Camshaft),
        LEAN: (SAVING, "bf16", Camshaft),
        PLAIN: ({}, "bf16", partial(Plain, device.kind, True)),
        EAGER: ({}, "bf16", partial(Plain, device.kind, False)),
    }
    if device.kind == "cuda":
        found[FP8] = (FASTEST, "fp8", Camshaft)
    return found


@dataclass
class Outcome:
    """What a contestant showed."""

    blocks: list[Block]
    """Without the first, in which it sets things up and compiles."""
    peak: int
    steady: int
    """Bytes of tensors at the fullest moment: of all, and of these blocks alone."""
    board: str


def run(
    blocks: int | None, only: Sequence[str] = (), keep: Callable[[dict[str, Any]], None] = lambda found: None
) -> dict[str, Any]:
    """Time every contestant, or those of these names; ``keep`` is given what is found so far, row by row."""
    device = Device.here()
    count = blocks or device.case.blocks
    with scratch() as folder:
        jobs = dict(_jobs(device, folder, only))
        config = next(iter(jobs.values()))[1]
        outcomes = _alone(device, jobs, count) if device.kind == "cuda" else _in_turns(device, jobs, count)
        rows = []
        for name, outcome in outcomes:
            rows.append(_row(device, config, name, outcome))
            keep(_found(device, rows))  # a call that is cut off has told what it found
            if device.kind == "cuda":
                print(_line(rows[-1]), flush=True)
    return _found(device, rows)


def _found(device: Device, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All figures that ``rows`` hold."""
    return {
        "device": device.kind,
        "board": next((row["board"] for row in rows if "board" in row), "none"),
        "rows": list(rows),
        "targets": _targets({row["contestant"]: row for row in rows if "failed" not in row}),
    }


Jobs = dict[str, tuple[Job, ModelConfig, Build]]


def _jobs(device: Device, folder: Path, only: Sequence[str]) -> Iterator[tuple[str, tuple[Job, ModelConfig, Build]]]:
    """Name to job, model and what builds the contestant."""
    for index, (name, (plugins, compute, build)) in enumerate(contestants(device).items()):
        if only and name not in only:
            continue
        resolved = recipe(device, folder / str(index), plugins, compute)
        prepare(resolved)
        config = check(resolved, 1).require().config
        assert config is not None
        yield name, (Job(resolved, device.case, 0, 1), config, partial(Peaked, build, device.kind))


def _alone(device: Device, jobs: Jobs, count: int) -> Iterator[tuple[str, Outcome | str]]:
    """One after another, each with the GPU to itself; a text is why one failed."""
    for name, (job, _, build) in jobs.items():
        try:
            with alive(name, [job], build, False, fresh=True) as runner:
                runner.ask("build")
                runner.steps(device.case.steps)
                runner.ask("peak")
                blocks = [runner.steps(device.case.steps) for _ in range(count)]
                told = runner.ask("peak")[0]
            yield name, Outcome(blocks, *told)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            yield name, str(error).strip().splitlines()[-1]


def _in_turns(device: Device, jobs: Jobs, count: int) -> list[tuple[str, Outcome | str]]:
    """All alive at once, block by block."""
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(alive(name, [job], build, False)) for name, (job, _, build) in jobs.items()
        }
        found: dict[str, list[Block]] = {name: [] for name in runners}
        for runner in runners.values():
            runner.ask("build")
        for _ in range(1 + count):
            for name, runner in runners.items():
                found[name].append(runner.steps(device.case.steps))
        told = {name: runner.ask("peak")[0] for name, runner in runners.items()}
    return [(name, Outcome(blocks[1:], *told[name])) for name, blocks in found.items()]


def _row(device: Device, config: ModelConfig, name: str, found: Outcome | str) -> dict[str, Any]:
    """Figures of a contestant, or why there are none. No MFU where nobody publishes the board's peak."""
    row: dict[str, Any] = {"case": device.case.name, "contestant": name}
    if isinstance(found, str):
        return row | {"failed": found}
    case, seconds = device.case, statistics.median(block.seconds for block in found.blocks)
    tokens = case.micro_batch_size * case.sequence_length / seconds
    flops, rate = tokens * config.flops_per_token(case.sequence_length), peak_rate(found.board, "bf16")
    return row | {
        "board": found.board,
        "ms": seconds * 1e3,
        "tokens_per_s": tokens,
        "tflops": flops / 1e12,
        "mfu": None if rate is None else flops / rate,
        "peak_gib": found.peak / 2**30,
        "steady_gib": found.steady / 2**30,
        "loss": found.blocks[-1].loss,
    }


def _targets(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of those that ran."""

    def ratio(key: str, one: str, *others: str) -> float | None:
        values = [rows[name][key] for name in others if name in rows and rows[name][key]]
        return rows[one][key] / max(values) if one in rows and values else None

    wanted = {
        "MFU": (rows.get(OURS, {}).get("mfu"), TARGETS["mfu"], True),
        "speed over PyTorch's best": (ratio("tokens_per_s", OURS, PLAIN, EAGER), TARGETS["speed"], True),
        "fp8 over bf16": (ratio("tokens_per_s", FP8, OURS), TARGETS["fp8"], True),
        "peak memory over PyTorch's": (ratio("peak_gib", LEAN, EAGER), TARGETS["memory"], False),
        "peak memory over compiled PyTorch's": (ratio("peak_gib", LEAN, PLAIN), TARGETS["memory"], False),
    }
    return [
        {"what": what, "found": found, "wanted": bound, "met": found >= bound if above else found <= bound}
        for what, (found, bound, above) in wanted.items()
        if found is not None
    ]


def _line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"| {row['case']} | {row['contestant']} |"
    if "failed" in row:
        return f"{head} {row['failed']} | | | | | | |"
    mfu = "" if row["mfu"] is None else format(row["mfu"], ".1%")
    return (
        f"{head} {row['ms']:.1f} | {row['tokens_per_s']:.0f} | {row['tflops']:.1f} | {mfu} "
        f"| {row['peak_gib']:.2f} | {row['steady_gib']:.2f} | {row['loss']:.4f} |"
    )


def table(results: dict[str, Any]) -> list[str]:
    """As Markdown."""
    none = "no GPU here: a tiny model on the CPU, to see that it runs"
    where = results["board"] if results["device"] == "cuda" else none
    return [
        f"## One device: {where}",
        "",
        "| case | contestant | ms a step | tokens/s | model TFLOP/s | MFU | peak, GiB | peak when warm, GiB | loss |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(_line, results["rows"]),
        "",
        *(
            f"- {row['what']}: {row['found']:.3f}, wanted {row['wanted']}, {'met' if row['met'] else 'missed'}"
            for row in results["targets"]
        ),
        "",
    ]
