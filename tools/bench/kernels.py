"""Single operations, forward and backward: ours in Triton, torch's own form, the same compiled, and Liger's kernels.

Time is the GPU's, without the host's part and from memory (``camshaft_kernels.stopwatch``), median of blocks in which
contestants take turns. An operation that is bound by memory is told in bytes a second: those that any implementation
has to read and write, over the time, beside the rate at which this GPU copies. Without a CUDA GPU it says that.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from camshaft_kernels.stopwatch import Sampler, Stopwatch
from tools.bench import kernels_forms
from tools.bench.kernels_forms import EAGER, OURS, Forms

SIZES: dict[str, dict[str, int]] = {
    "1b": {"tokens": 16_384, "hidden": 2048, "inner": 8192, "queries": 32, "keys": 8, "width": 64},
    "8b": {"tokens": 8192, "hidden": 4096, "inner": 14_336, "queries": 32, "keys": 8, "width": 128},
}
"""Of a layer of Llama 3.2 1B and 3.1 8B, with so many tokens at a time, in bf16."""

VOCABULARY = 128_256
ELEMENTS = 1 << 28
"""Parameters of one update, in ``TENSORS`` tensors."""
TENSORS = 64
BLOCKS = 30
TARGET = 1.0
"""Our speed over the best of compiled and Liger's, in each case."""


@dataclass
class Case:
    """One operation at one size."""

    name: str
    forms: Forms
    inputs: Callable[[torch.device], Sequence[Any]]
    traffic: int
    """Bytes that have to be read and written, forward and backward."""
    operations: int = 0
    """Floating-point operations of matrix products, where those are what takes the time."""
    trained: bool = True
    """Whether it has a backward."""


def cases(
    sizes: Mapping[str, Mapping[str, int]] = SIZES, vocabulary: int = VOCABULARY, elements: int = ELEMENTS
) -> list[Case]:
    """All of them."""
    made = [case for label, size in sizes.items() for case in [*_layer(label, size), *_losses(label, size, vocabulary)]]
    shapes = [elements // TENSORS] * TENSORS
    for dtype, each in ((torch.float32, 28), (torch.bfloat16, 22)):
        name = f"adamw {elements >> 20} Mi {str(dtype).removeprefix('torch.')}"
        inputs = partial(_updated, shapes, dtype)
        made.append(Case(name, kernels_forms.adamw(), inputs, each * elements, trained=False))
    return made


def _layer(label: str, size: Mapping[str, int]) -> list[Case]:
    tokens, hidden, inner = size["tokens"], size["hidden"], size["inner"]
    rows, gates = tokens * hidden, tokens * inner
    heads = tokens * size["width"] * (size["queries"] + size["keys"])
    angles = 2 * tokens * size["width"] * 4

    def norm(terms: int) -> Callable[[torch.device], Sequence[Any]]:
        return lambda device: [*(_leaf(device, 1, tokens, hidden) for _ in range(terms)), _leaf(device, hidden)]

    return [
        Case(f"rms_norm {label}", kernels_forms.rms_norm(), norm(1), 5 * 2 * rows),
        Case(f"add_rms_norm {label}", kernels_forms.add_rms_norm(), norm(2), 8 * 2 * rows),
        Case(f"rope {label}", kernels_forms.rope(), lambda device: _heads(size, device), 4 * 2 * heads + 2 * angles),
        Case(
            f"swiglu {label}",
            kernels_forms.swiglu(),
            lambda device: [_leaf(device, 1, tokens, inner) for _ in range(2)],
            8 * 2 * gates,
        ),
    ]


def _losses(label: str, size: Mapping[str, int], vocabulary: int) -> list[Case]:
    tokens, hidden = size["tokens"], size["hidden"]
    fewer = tokens // 4  # the logits of all tokens would fill the GPU in torch's form

    def logits(device: torch.device) -> Sequence[Any]:
        return _leaf(device, 1, fewer, vocabulary), _labels(device, fewer, vocabulary)

    def projected(device: torch.device) -> Sequence[Any]:
        weight = _leaf(device, vocabulary, hidden, scale=hidden**-0.5)
        return _leaf(device, 1, tokens, hidden), weight, _labels(device, tokens, vocabulary)

    products = 6 * tokens * hidden * vocabulary
    return [
        Case(f"cross_entropy {label}", kernels_forms.cross_entropy(), logits, 3 * 2 * fewer * vocabulary),
        Case(f"linear_cross_entropy {label}", kernels_forms.linear_cross_entropy(), projected, 0, products),
    ]


def _leaf(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device, dtype=torch.bfloat16) * scale).requires_grad_()


def _labels(device: torch.device, tokens: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (1, tokens), device=device)


def _heads(size: Mapping[str, int], device: torch.device) -> Sequence[Any]:
    turn = torch.rand(1, size["tokens"], 1, size["width"] // 2, device=device)
    q, k = (_leaf(device, 1, size["tokens"], size[name], size["width"]) for name in ("queries", "keys"))
    angles = torch.cat((turn.cos(), turn.cos()), -1), torch.cat((-turn.sin(), turn.sin()), -1)
    return q, k, angles, torch.bfloat16


def _updated(shapes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Sequence[Any]:
    def tensors(kind: torch.dtype) -> list[Tensor]:
        return [torch.rand(shape, device=device).to(kind) for shape in shapes]

    return tensors(dtype), tensors(dtype), tensors(torch.float32), tensors(torch.float32)


def once(form: Callable[..., Any], inputs: Sequence[Any], trained: bool) -> Callable[[], Any]:
    """One run: forward and backward, with upstream gradients made before."""
    if not trained:
        return lambda: form(*inputs)
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    made = form(*inputs)
    made = made if isinstance(made, tuple) else (made,)
    upstream = [torch.randn_like(value) for value in made]

    def run() -> tuple[Tensor, ...]:
        outputs = form(*inputs)
        return torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), leaves, upstream)

    return run


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """What a run allocates above what was there."""
    if device.type != "cuda":
        return 0
    gc.collect()  # compiling leaves cycles behind that hold tensors of its last run
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    case: Case, stopwatch: Stopwatch, copied: float, blocks: int, contestants: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One row a contestant. What is not installed or does not fit says so in its row."""
    rows: dict[str, dict[str, Any]] = {}
    samplers: dict[str, Sampler] = {}
    for name, make in case.forms.items():
        if not contestants or name in contestants:
            rows[name] = {"case": case.name, "contestant": name}
            try:
                sampler = stopwatch.prepare(_call(case, make, stopwatch.device))
                rows[name]["peak_mb"] = peak_bytes(sampler.call, stopwatch.device) / 2**20
                samplers[name] = sampler
            except Exception as error:  # whatever a library raises: the others are still to be timed
                rows[name]["failed"] = str(error).partition("\n")[0] or type(error).__name__
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(blocks):
        for name, sampler in samplers.items():
            times[name].append(sampler())
    for name, found in times.items():
        rows[name] |= {**_figures(case, statistics.median(found), copied), "waits": not samplers[name].ahead}
    return list(rows.values())


def _call(case: Case, make: Callable[[], Callable[..., Any]], device: torch.device) -> Callable[[], Any]:
    """A run of this contestant. Inputs are its own, because some write over them."""
    torch.manual_seed(0)
    return once(make(), case.inputs(device), case.trained)


def _figures(case: Case, ms: float, copied: float) -> dict[str, Any]:
    rate = case.traffic / ms * 1e3
    return {"ms": ms, "gb_s": rate / 1e9, "of_copy": rate / copied, "tflop_s": case.operations / ms / 1e9}


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our speed over the best of the others, in each case that more than torch's form runs."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        times = {row["contestant"]: row["ms"] for row in rows if row["case"] == case and "ms" in row}
        peers = {name: ms for name, ms in times.items() if name not in (OURS, EAGER)}
        if OURS in times and peers:
            best = min(peers, key=lambda name: peers[name])
            speed = peers[best] / times[OURS]
            found.append({"case": case, "peer": best, "speed": speed, "wanted": TARGET, "met": speed >= TARGET})
    return found


def missing() -> str | None:
    """Why nothing can be timed here."""
    return None if torch.cuda.is_available() else "kernels are timed on a CUDA GPU, and torch sees none here"


def run(
    blocks: int | None,
    names: Sequence[str] = (),
    contestants: Sequence[str] = (),
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """All cases, or those whose names begin with one of ``names``; or, without a GPU, why not.

    ``keep`` is given what is found so far, case by case.
    """
    reason = missing()
    if reason is not None:
        return {"missing": reason}
    device = torch.device("cuda", torch.cuda.current_device())
    stopwatch = Stopwatch(device)
    copied = stopwatch.copy_rate()
    machine = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, **kernels_forms.versions()}
    found: dict[str, Any] = {"machine": machine, "copy_gb_s": copied / 1e9, "cache": stopwatch.cache}
    found |= {"rows": [], "targets": []}
    for case in cases():
        if not names or any(case.name.startswith(name) for name in names):
            found["rows"] += measure(case, stopwatch, copied, blocks or BLOCKS, contestants)
            found["targets"] = verdicts(found["rows"])
            keep(found)  # compiling takes minutes: a call that is cut off has told what it found
            torch.cuda.empty_cache()
    return found


def table(found: Mapping[str, Any]) -> list[str]:
    """Markdown."""
    if "missing" in found:
        return ["## Kernels", "", f"Not measured: {found['missing']}.", ""]
    lines = ["## Kernels: forward and backward, bf16", "", ", ".join(f"{k} {v}" for k, v in found["machine"].items())]
    lines += [f"Copies at {found['copy_gb_s']:.0f} GB/s. Medians; {found['cache']}.", ""]
    lines += [
        "| case | contestant | ms | GB/s | of the copy rate | TFLOP/s | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        head = f"| {row['case']} | {row['contestant']} |"
        if "failed" in row:
            lines.append(f"{head} {row['failed']} | | | | |")
            continue
        bound = f"{row['gb_s']:.0f} | {row['of_copy']:.2f} | |" if row["gb_s"] else f"| | {row['tflop_s']:.0f} |"
        waits = " (waits for the GPU)" if row["waits"] else ""
        lines.append(f"{head} {row['ms']:.3f}{waits} | {bound} {row['peak_mb']:.0f} |")
    lines += ["", "| case | best of the others | our speed over it | at least | |", "|---|---|---|---|---|"]
    for row in found["targets"]:
        met = "met" if row["met"] else "missed"
        lines.append(f"| {row['case']} | {row['peer']} | {row['speed']:.3f} | {row['wanted']} | {met} |")
    return [*lines, ""]
