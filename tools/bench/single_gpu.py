"""One device, a model of one billion parameters: ours with everything that makes it fast, beside plain PyTorch.

Every contestant has a process of its own and the same samples and first values; blocks alternate. On a machine without
a GPU the same code runs a tiny model on the CPU, which shows that it works and nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
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
from tools.bench.processes import Block, Build, Ranks, alive
from tools.bench.setup import ADAMW, MAX_NORM, Case, plain_loader, plain_optimizer, scratch

ONE_B: dict[str, object] = {"preset": "llama-1b", "vocab_size": 32_000, "max_position_embeddings": 4096}
TINY: dict[str, object] = {"preset": "llama-nano"}
FASTEST: dict[str, Any] = {"kernels": {"all": "auto"}, "compile": {}}
SAVING: dict[str, Any] = {**FASTEST, "recompute": {"mode": "selective"}}
OURS, FP8, LEAN = "Camshaft", "Camshaft, fp8", "Camshaft, selective recompute"
PLAIN, EAGER = "PyTorch, compiled", "PyTorch"
NAMES = (OURS, LEAN, PLAIN, EAGER, FP8)
TARGETS = {"mfu": 0.55, "speed": 1.05, "fp8": 1.2, "memory": 0.7}
"""MFU of ours; ours over the better of PyTorch's; fp8 over ours in bf16; peak memory of the lean one over PyTorch's."""


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
    """A contestant whose largest memory on the device is told instead of the loss, when no step is asked for."""

    def __init__(self, build: Build, device: str, job: Job) -> None:
        self._device = device
        self._inner: Contestant = build(job)

    def steps(self, count: int) -> float:
        """Run ``count`` windows and wait for the device."""
        loss = self._inner.steps(count)
        if self._device == "cuda":
            torch.cuda.synchronize()
        return loss

    def peak(self) -> int:
        """Bytes of tensors at the fullest moment so far; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else 0

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


def run(blocks: int | None, only: Sequence[str] = ()) -> dict[str, Any]:
    """Time every contestant (or those of these names) in turns."""
    device = Device.here()
    with scratch() as folder, ExitStack() as stack:
        runners: dict[str, Ranks] = {}
        config: ModelConfig | None = None
        for index, (name, (plugins, compute, build)) in enumerate(contestants(device).items()):
            if only and name not in only:
                continue
            resolved = recipe(device, folder / str(index), plugins, compute)
            prepare(resolved)
            config = check(resolved, 1).require().config
            job = Job(resolved, device.case, 0, 1)
            runners[name] = stack.enter_context(alive(name, [job], partial(Peaked, build, device.kind), False))
            runners[name].ask("build")
        found: dict[str, list[Block]] = {name: [] for name in runners}
        for _ in range(1 + (blocks or device.case.blocks)):
            for name, runner in runners.items():
                found[name].append(runner.steps(device.case.steps))
        peaks = {name: runner.ask("peak")[0] for name, runner in runners.items()}
    assert config is not None
    # The processes are gone: from here on a context of this one disturbs nobody.
    board = torch.cuda.get_device_name(0) if device.kind == "cuda" else "CPU"
    rate = peak_rate(board, "bf16")
    rows = [_row(device, config, name, blocks_[1:], peaks[name], rate) for name, blocks_ in found.items()]
    return {
        "device": device.kind,
        "board": board,
        "rows": rows,
        "targets": _targets({row["contestant"]: row for row in rows}),
    }


def _row(
    device: Device, config: ModelConfig, name: str, blocks: list[Block], peak: int, rate: float | None
) -> dict[str, Any]:
    """``rate``: the board's floating-point operations a second in bf16; None if nobody publishes it."""
    case, seconds = device.case, statistics.median(block.seconds for block in blocks)
    tokens = case.micro_batch_size * case.sequence_length / seconds
    flops = tokens * config.flops_per_token(case.sequence_length)
    return {
        "case": case.name,
        "contestant": name,
        "ms": seconds * 1e3,
        "tokens_per_s": tokens,
        "tflops": flops / 1e12,
        "mfu": None if rate is None else flops / rate,
        "peak_gib": peak / 2**30,
        "loss": blocks[-1].loss,
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
    }
    return [
        {"what": what, "found": found, "wanted": bound, "met": found >= bound if above else found <= bound}
        for what, (found, bound, above) in wanted.items()
        if found is not None
    ]


def table(results: dict[str, Any]) -> list[str]:
    """As Markdown."""
    none = "no GPU here: a tiny model on the CPU, to see that it runs"
    where = results["board"] if results["device"] == "cuda" else none
    return [
        f"## One device: {where}",
        "",
        "| case | contestant | ms a step | tokens/s | model TFLOP/s | MFU | peak, GiB |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['contestant']} | {row['ms']:.1f} | {row['tokens_per_s']:.0f} "
            f"| {row['tflops']:.1f} | {'' if row['mfu'] is None else format(row['mfu'], '.1%')} "
            f"| {row['peak_gib']:.2f} |"
            for row in results["rows"]
        ),
        "",
        *(
            f"- {row['what']}: {row['found']:.3f}, wanted {row['wanted']}, {'met' if row['met'] else 'missed'}"
            for row in results["targets"]
        ),
        "",
    ]
