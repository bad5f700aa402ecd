"""``batch.micro_batch_size: auto``: the plan's choice, trials of it through the launcher, and a run that keeps it.

Each trial is a run of its own, by the hidden command ``trial``, on as many ranks as the run will have. What one rank
has no room for does not fit: its exit status ends the trial on all of them, whatever they were waiting for.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from camshaft import finder
from camshaft.cli import ranks
from camshaft.cli.streams import announce
from camshaft.errors import Interrupted, MachineError, OutOfMemory, RecipeError
from camshaft.host import Host
from camshaft.recipe import check, load
from camshaft.recipe.checks import AUTO
from camshaft.rundir import Choice, RunDirectory

if TYPE_CHECKING:
    from camshaft.cli.train import Take
    from camshaft.finder import Found, Trial
    from camshaft.recipe import Resolved

CONTEXT_BYTES = 1 << 30
"""Of a GPU's memory, for what is not tensors: context, libraries, workspaces."""

FOLDER = "trials"


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
    raise RecipeError(resolved.problem("batch.micro_batch_size", message, fix))


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
    return None if isinstance(given, str) else int(given * 2**30)


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
        checked = check(resolved, processes, device=device).require()
        assert checked.mesh is not None
        batch = (resolved.recipe.batch.global_batch_size, checked.mesh.batch_degree)
        if found is None or not found.serves(*batch):
            found = _find(resolved, changes, processes, device, choice.directory, batch)
            found.write(choice.directory.path)
        announce(f"micro batch  {found.micro_batch_size}, found for auto ({choice.directory.path / finder.FILE})")
    finally:
        choice.lock.release()
    settled = (*changes, f"batch.micro_batch_size={found.micro_batch_size}", f"run.dir={choice.directory.path}")
    return load(resolved.path, settled, world_size=processes), settled


def _find(
    resolved: Resolved,
    changes: Sequence[str],
    processes: int,
    device: str,
    directory: RunDirectory,
    batch: tuple[int, int],
) -> Found:
    memory, expected = memory_of(resolved, processes, device), peaks(resolved, processes, device)

    def attempt(size: int) -> Trial:
        announce(f"trying        micro batch {size}: planned {expected[size] / 2**30:.3g} of {memory / 2**30:.3g} GiB")
        tried = _attempt(resolved, changes, processes, device, directory, size, batch[1])
        announce(f"              {'fits' if tried.fits else f'does not fit: {tried.why}'}")
        return tried

    size, trials = finder.search(expected, memory, attempt)
    return finder.Found(size, finder.planned(expected, memory), memory, *batch, trials)


def _attempt(
    resolved: Resolved,
    changes: Sequence[str],
    processes: int,
    device: str,
    directory: RunDirectory,
    size: int,
    data_ranks: int,
) -> Trial:
    """One trial, with as many microbatches as tell what a window holds at most: 2, or those of a full pipeline."""
    recipe = resolved.recipe
    folder = directory.path / FOLDER / f"micro_{size}"
    shutil.rmtree(folder, ignore_errors=True)
    enough = max(2, 2 * recipe.parallel.pipeline_parallel)
    total = min(recipe.batch.global_batch_size, size * data_ranks * enough)
    tried = (*changes, f"batch.micro_batch_size={size}", f"batch.global_batch_size={total}", f"run.dir={folder}")
    try:
        if processes > 1:
            _on_ranks(load(resolved.path, tried), tried, processes, device, folder)
        else:
            _in_a_process(resolved, tried, folder)
    except OutOfMemory as error:
        return finder.Trial(size, False, None, str(error))
    return finder.Trial(size, True, max(json.loads(path.read_text()) for path in folder.glob("rank_*.peak.json")))


def _on_ranks(resolved: Resolved, changes: Sequence[str], processes: int, device: str, folder: Path) -> None:
    from camshaft.cli import train

    def take(_: Resolved) -> Choice:
        directory = RunDirectory(folder)
        return Choice(directory, directory.create().lock(), False, f"trial in     {folder}")

    train.front(resolved, changes, processes, device, take, ("trial",))


def _in_a_process(resolved: Resolved, changes: Sequence[str], folder: Path) -> None:
    logs = RunDirectory(folder).create().logs
    line = [sys.executable, "-m", "camshaft", "trial", str(resolved.path), *changes]
    with (logs / "trial.log").open("wb") as log:
        status = subprocess.run(line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=False).returncode
    if status == 0:
        return
    last = (logs / "trial.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    text = f"{''.join(last) or f'ended with status {status}'}. Log: {logs / 'trial.log'}"
    if status in (OutOfMemory.exit_status, -9):  # the kernel's killer leaves no word
        raise OutOfMemory(text if status > 0 else f"the trial was killed. Log: {logs / 'trial.log'}")
    if status in (Interrupted.exit_status, -2):
        raise Interrupted("stopped while looking for a micro batch that fits")
    raise MachineError(f"a trial failed, of something else than memory: {text}")
