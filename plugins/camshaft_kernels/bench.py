"""``camshaft bench kernels``: time every provider that is present, and write the table by which ``auto`` chooses."""

from __future__ import annotations

import argparse
import errno
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from camshaft.cli import inventory
from camshaft.cli.console import say
from camshaft.errors import MachineError, is_out_of_memory
from camshaft_kernels import table
from camshaft_kernels.cases import HEAD, TIMED, Case, cases
from camshaft_kernels.limits import unusable
from camshaft_kernels.offers import OFFERS, Offer
from camshaft_kernels.sizes import UPDATES, device_of
from camshaft_kernels.stopwatch import Stopwatch
from camshaft_kernels.table import Row, Table

DEFAULT_DTYPES = ("bf16", "fp32")
LEAST = 5
"""Runs of each at least."""


def main(words: Sequence[str]) -> None:
    """Run the command with the words behind ``camshaft bench kernels``.

    Raises:
        MachineError: there is no such device, or the table cannot be written.
    """
    options = _parser().parse_args(list(words))
    device = _device(options.device)
    path = Path(options.output) if options.output else table.place(device_of(device))
    partial = _place_for(path)
    dtypes, chosen = tuple(options.dtype or DEFAULT_DTYPES), frozenset(options.op or ())
    say(f"timing {', '.join(options.op or ['every operation'])} in {', '.join(dtypes)} on {_where(device)}")
    try:
        made = measure(device, dtypes, chosen, options.seconds)
        whole = _beside_earlier(made, path)
        timed_ops = {row.op for row in made.rows}
        for op in (op for op in OFFERS if op not in timed_ops and (op in chosen or not chosen)):
            say(f"{op}: no row, {_why_none(op, device, dtypes[-1])}")
        if not made.rows:
            say("nothing to choose: no operation has two implementations here, and no table was written")
            return
        partial.write_text(whole.dumps(), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    kept = len(whole.rows) - len(made.rows)
    say(f"{len(made.rows)} rows in {path}" + (f", beside {kept} that were there" if kept else ""))
    if options.output is None:
        say("plugins.kernels takes them where it says auto")


def _place_for(path: Path) -> Path:
    """An empty file beside ``path``, made before anything is measured: minutes are not spent on what cannot be kept.

    Raises:
        MachineError: it cannot be made.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial.touch()
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror}. Give a file with --output") from error
    return partial


def _where(device: torch.device) -> str:
    """The machine in words, and why it is not a GPU where it is none."""
    known = machine(device)
    if device.type == "cuda":
        return f"{known['name']}, torch {torch.__version__}"
    gpu = "" if torch.cuda.is_available() else "; torch sees no GPU"
    return f"the CPU ({known['name']}, threads: {known['threads']}, torch {torch.__version__}{gpu})"


def _why_none(op: str, device: torch.device, dtype: str) -> str:
    """Why ``op`` was not timed: by the providers that cannot be used."""
    if op not in TIMED:
        return "it is not timed alone: auto leaves it to the rules"
    left = {offer.provider: unusable(offer, device, dtype, HEAD) for offer in OFFERS[op].values()}
    reasons = dict.fromkeys(reason for reason in left.values() if reason is not None)
    return "; ".join(reasons) or "what could be timed is told above"


def _beside_earlier(made: Table, path: Path) -> Table:
    """``made`` with what ``path`` has of the same machine and nobody measured now: other operations, other dtypes."""
    before = table.read(path, made.device) if path.is_file() else None
    if before is None or dict(before.machine) != dict(made.machine):
        return made
    fresh = {(row.op, row.dtype) for row in made.rows}
    return replace(made, rows=(*(row for row in before.rows if (row.op, row.dtype) not in fresh), *made.rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="camshaft bench kernels",
        description="Time every implementation of each operation, forward and backward, on this machine. Let nothing "
        "else run beside it.",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), action="append", help="default: bf16 and fp32")
    parser.add_argument("--op", choices=tuple(OFFERS), metavar="OP", action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each provider and row (0.5)")
    parser.add_argument("--output", help="file of the table; default: the user's cache folder")
    return parser


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("torch sees no GPU here; `camshaft doctor` shows why")
    return torch.device(name)


def measure(device: torch.device, dtypes: tuple[str, ...], ops: frozenset[str], seconds: float) -> Table:
    """Time every case in which there is a choice, and say each row: medians, and where memory is what it waits for the
    rate by the bytes that any implementation reads and writes, beside the rate of a copy.
    """
    stopwatch = Stopwatch(device)
    copied = stopwatch.copy_rate()
    say(f"{stopwatch.cache}; copies at {copied / 1e9:.3g} GB/s")
    rows = []
    for case in cases(device, dtypes, ops):
        present = [offer for offer in OFFERS[case.op].values() if _present(offer, case, device)]
        if len(present) < 2 or (case.op in UPDATES and case.dtype != "fp32"):
            continue  # nothing to choose; and updates are of fp32 masters
        times = {offer.provider: _time(offer, case, stopwatch, seconds) for offer in present}
        found = {name: ms for name, ms in times.items() if ms is not None}
        if len(found) > 1:
            rows.append(Row(case.op, case.dtype, case.size, case.shape, found))
            shown = [_shown(name, ms, case, copied) for name, ms in sorted(found.items(), key=lambda pair: pair[1])]
            say(f"{case.op} {case.dtype} {case.shape}: {', '.join(shown)}")
    return Table(device_of(device), machine(device), tuple(rows))


def _shown(name: str, ms: float, case: Case, copied: float) -> str:
    rate = case.traffic / ms * 1e3
    return f"{name} {ms:.3g} ms" + (f" ({rate / 1e9:.3g} GB/s, {rate / copied:.2f} of a copy)" if rate else "")


def machine(device: torch.device) -> dict[str, str]:
    """Names and versions that times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {each: inventory.version(each) or "" for each in ("torch", "triton", "liger-kernel", "flash-attn")}
    return {
        "name": name,
        "threads": str(torch.get_num_threads()),
        "cuda": torch.version.cuda or "",
        **{each: version for each, version in versions.items() if version},
    }


def _present(offer: Offer, case: Case, device: torch.device) -> bool:
    if offer.provider == "triton" and device.type == "cpu":
        return False  # its interpreter is for tests
    return unusable(offer, device, case.dtype, HEAD) is None


def _time(offer: Offer, case: Case, stopwatch: Stopwatch, seconds: float) -> float | None:
    """Milliseconds; None, and a line that says why, where it fails here."""
    try:
        sampler = stopwatch.prepare(case.make(offer.entries()))
        found = sampler.median(seconds, LEAST)
        if not sampler.ahead:
            say(f"{case.op} {case.dtype} {case.shape}: {offer.provider} waits for the GPU on its way, which is counted")
        return found
    except Exception as error:
        if is_out_of_memory(error) and stopwatch.device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"{case.op} {case.dtype} {case.shape}: {offer.provider} failed: {str(error).partition(chr(10))[0]}")
        return None
