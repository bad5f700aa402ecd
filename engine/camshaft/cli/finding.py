"""``batch.micro_batch_size: auto``: the plan's choice, trials of it through the launcher, and a run that keeps it.

Each trial is a run of its own, by the hidden command ``trial``, on as many ranks as the run will have. What one rank
has no room for does not fit: its exit status ends the trial on all of them, whatever they were waiting for.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from camshaft import finder
from camshaft.cli import ranks
from camshaft.cli.streams import announce
from camshaft.errors import Interrupted, MachineError, OutOfMemory, RecipeError
from camshaft.host import Host
from camshaft.processes import kernel_memory_kills
from camshaft.recipe import check, load
from camshaft.recipe.checks import AUTO
from camshaft.rundir import Choice, RunDirectory

if TYPE_CHECKING:
    from camshaft.cli.train import Take
    from camshaft.finder import Found, Trial
    from camshaft.recipe import Resolved

CONTEXT_BYTES = 1 << 30
"""Of a GPU's memory, for what is not tensors: context, libraries, workspaces."""

FOLDER, MICRO = "trials", "batch.micro_batch_size"


def asked(resolved: Resolved) -> bool:
    """Whether the micro batch is to be found."""
    return resolved.recipe.batch.micro_batch_size == AUTO


def refuse(resolved: Resolved, world_size: int) -> None:
    """Under a launcher of the user's own nobody can start trials.

    Raises:
        RecipeError: the micro batch is to be found; says what the plan would choose, if it knows the memory.
    """
    if not asked(resolved):
        return
    memory = stated(resolved)
    fix = "let `camshaft train` start the ranks, or set a number"
    if memory is not None:
        size = finder.planned(peaks(resolved, world_size, "any"), memory)
        fix += f": {size} fits by the plan"
    message = "auto is found in trials, which a launcher of your own cannot start"
    raise RecipeError(resolved.problem(MICRO, message, fix))


def chosen(resolved: Resolved, world_size: int) -> tuple[Resolved, str]:
    """The recipe with the plan's own choice in place of auto, and a line that says so; as it is where it gives one."""
    if not asked(resolved):
        return resolved, ""
    check(resolved, world_size).require()
    memory = stated(resolved)
    if memory is None and resolved.recipe.launch.device == "cpu":
        memory = available_bytes() // world_size
    if memory is None:
        return _with(
            resolved, 1
        ), "micro batch  auto: shown with 1; set launch.memory_gib to see what would be chosen\n"
    size = finder.planned(peaks(resolved, world_size, "any"), memory)
    fits = f"of a rank's {memory / 2**30:.3g} GiB; trials of the run have the last word"
    return _with(resolved, size), f"micro batch  auto: {size} by the plan, {fits}\n"


def stated(resolved: Resolved) -> int | None:
    """Bytes of a rank that the recipe gives; None if it leaves them to the device."""
    given = resolved.recipe.launch.memory_gib
    return None if isinstance(given, str) else int(min(given * 2**30, sys.maxsize))


def memory_of(resolved: Resolved, processes: int, device: str) -> int:
    """Bytes that one of ``processes`` ranks on this machine may fill."""
    given = stated(resolved)
    if given is not None:
        return given
    if device == "cuda":
        import torch

        count = min(processes, torch.cuda.device_count())
        return min(torch.cuda.get_device_properties(each).total_memory for each in range(count)) - CONTEXT_BYTES
    return available_bytes() // processes


def available_bytes() -> int:
    """Memory of this machine that is free, by the kernel's own estimate.

    Raises:
        MachineError: the kernel does not say.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration) as error:
        raise MachineError("this system does not say how much memory is free. Set launch.memory_gib") from error


def peaks(resolved: Resolved, world_size: int, device: str) -> Mapping[int, int]:
    """Planned bytes of the fullest rank for each size that the recipe is legal with.

    Raises:
        RecipeError: it is legal with none; says what is wrong with the smallest.
    """
    checked = check(resolved, world_size, device=device).require()
    assert checked.mesh is not None and checked.batch is not None
    found: dict[int, int] = {}
    total, stages = checked.batch.global_batch_size, checked.mesh["pp"].degree
    for size in finder.candidates(total, checked.mesh.batch_degree, stages):
        changed = _with(resolved, size)
        each = check(changed, world_size, device=device)
        if not each.problems:
            found[size] = ranks.Ranks(each, Host.of(changed.recipe.plugins)).fullest.most
    if not found:
        check(_with(resolved, 1), world_size, device=device).require()
    return found


def _with(resolved: Resolved, size: int) -> Resolved:
    batch = resolved.recipe.batch.model_copy(update={"micro_batch_size": size})
    return replace(resolved, recipe=resolved.recipe.model_copy(update={"batch": batch}))


def settle(
    resolved: Resolved, changes: Sequence[str], processes: int, device: str, take: Take
) -> tuple[Resolved, tuple[str, ...]]:
    """The recipe and its overrides with a micro batch that fits, in a run directory that is chosen and knows it.

    Raises:
        OutOfMemory: none fits.
        Interrupted: asked to stop.
    """
    choice = take(resolved)
    try:
        found = finder.read(choice.directory.path) if choice.continued else None
        search = _Search(resolved, tuple(changes), processes, device, choice.directory)
        if found is None or not found.serves(*search.batch):
            found = search.run()
            found.write(choice.directory.path)
        announce(f"micro batch  {found.micro_batch_size}, found for auto ({choice.directory.path / finder.FILE})")
    finally:
        choice.lock.release()
    settled = changed(changes, {MICRO: found.micro_batch_size, "run.dir": choice.directory.path})
    return load(resolved.path, settled, world_size=processes), settled


def changed(changes: Sequence[str], values: Mapping[str, object]) -> tuple[str, ...]:
    """Overrides with ``values`` in place of what they said of the same keys."""
    others = (each for each in changes if each.partition("=")[0].strip() not in values)
    return (*others, *(f"{key}={value}" for key, value in values.items()))


@dataclass(frozen=True, slots=True)
class _Search:
    """What a search is for, and where its trials leave their logs."""

    resolved: Resolved
    changes: tuple[str, ...]
    processes: int
    device: str
    directory: RunDirectory

    @property
    def batch(self) -> tuple[int, int]:
        """Global batch, and ranks that it is divided over."""
        checked = check(self.resolved, self.processes, device=self.device).require()
        assert checked.mesh is not None
        return self.resolved.recipe.batch.global_batch_size, checked.mesh.batch_degree

    def run(self) -> Found:
        memory = memory_of(self.resolved, self.processes, self.device)
        expected, batch = peaks(self.resolved, self.processes, self.device), self.batch

        def attempt(size: int) -> Trial:
            planned, limit = (f"{value / 2**30:.3g}" for value in (expected[size], memory))
            announce(f"trying       micro batch {size}: {planned} GiB by the plan, of {limit}")
            tried = self._attempt(size, *batch)
            announce(f"             {'fits' if tried.fits else f'does not fit: {tried.why}'}")
            return tried

        size, trials = finder.search(expected, memory, attempt)
        return finder.Found(size, finder.planned(expected, memory), memory, *batch, trials)

    def _attempt(self, size: int, total: int, data_ranks: int) -> Trial:
        """One trial, of two microbatches a window, which hold as much as more of them; of a pipeline, which may hold
        all of them at once, of the whole window.
        """
        folder = self.directory.path / FOLDER / f"micro_{size}"
        shutil.rmtree(folder, ignore_errors=True)
        if self.resolved.recipe.parallel.pipeline_parallel == 1:
            total = min(total, 2 * size * data_ranks)
        tried = changed(self.changes, {MICRO: size, "batch.global_batch_size": total, "run.dir": folder})
        try:
            if self.processes > 1:
                _on_ranks(load(self.resolved.path, tried), tried, self.processes, self.device, folder)
            else:
                _in_a_process(self.resolved, tried, folder)
        except OutOfMemory as error:
            return finder.Trial(size, False, None, str(error))
        most = max(json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank_*.peak.json"))
        return finder.Trial(size, True, most)


def _on_ranks(resolved: Resolved, changes: Sequence[str], processes: int, device: str, folder: Path) -> None:
    from camshaft.cli import train

    def take(_: Resolved) -> Choice:
        directory = RunDirectory(folder)
        return Choice(directory, directory.create().lock(), False, f"trial in     {folder}")

    train.front(resolved, changes, processes, device, take, ("trial",))


def _in_a_process(resolved: Resolved, changes: Sequence[str], folder: Path) -> None:
    logs = RunDirectory(folder).create().logs
    line = [sys.executable, "-m", "camshaft", "trial", str(resolved.path), *changes]
    kills = kernel_memory_kills()
    with (logs / "trial.log").open("wb") as log:
        status = subprocess.run(line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=False).returncode
    if status == 0:
        return
    last = (logs / "trial.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    text = f"{''.join(last) or f'ended with status {status}'}. Log: {logs / 'trial.log'}"
    if status == -signal.SIGKILL and kernel_memory_kills() > kills:
        raise OutOfMemory(f"the kernel killed the trial for memory. Log: {logs / 'trial.log'}")
    if status == OutOfMemory.exit_status:
        raise OutOfMemory(text)
    if status in (Interrupted.exit_status, -signal.SIGINT):
        raise Interrupted("stopped while looking for a micro batch that fits")
    raise MachineError(f"a trial failed, of something else than memory: {text}")
