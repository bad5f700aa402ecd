"""Running a recipe on forked ranks: a recording, or the failure that a rank met first."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from camshaft.distributed import JOB_VARIABLE, Environment
from camshaft.errors import CamshaftError, PluginError, RecipeError
from camshaft.loop import session
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft.testing.run import Quiet
from camshaft.verify.copies import WrongCopies
from camshaft.verify.record import Dtypes, Recorder, Recording, UnequalCopies

if TYPE_CHECKING:
    from camshaft.plugin import Plugin
    from camshaft.recipe import Resolved

RUN_S = 100.0
"""Seconds that all steps of a small run may take together."""
_ECHOES = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out", "timeout")
"""What ranks say when a peer has gone, or never comes."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that did not end: which rank says what, and the plugin and hook that the error names."""

    rank: int | None
    message: str
    plugin: str = ""
    hook: str = ""
    refused: bool = False
    """Whether the recipe was refused: by a plugin that met the model, or because a plugin did nothing."""
    told: bool = False
    """Whether a plugin told something wrong of how parameters lie, which others go by."""

    @property
    def echo(self) -> bool:
        """Whether it only tells of another rank's end."""
        return any(sign in self.message for sign in _ECHOES)

    def __str__(self) -> str:
        return self.message if self.rank is None else f"rank {self.rank}: {self.message}"


@dataclass(frozen=True, slots=True)
class Unequal:
    """Two ranks that recorded other bits of what both hold: where first, and on which rank.

    ``place`` is a step, a quantity and a name, with commas between them.
    """

    place: str
    rank: int | None = None

    @property
    def quantity(self) -> str:
        """What it is of, as in ``judge``."""
        return self.place.split(", ")[1].split(":")[0]

    def __str__(self) -> str:
        return self.place if self.rank is None else f"{self.place} has other bits on rank {self.rank} than on rank 0"


Outcome = Recording | Failure | Unequal


def run(
    resolved: Resolved, ranks: int, dtypes: str | None = None, timeout_s: float = RUN_S, *, still: bool = True
) -> Outcome:
    """Train ``resolved`` to its end on ``ranks`` forked ranks.

    ``dtypes``: owned here, and not by a plugin. ``still``: without dropout.
    """
    # What each rank would import at its first deterministic step, for most of a second, is forked with them.
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())
    try:
        found = run_ranks(ranks, _train, resolved, dtypes, still, timeout_s=timeout_s)
    except RankFailed as error:
        return Failure(None, _brief(str(error)))
    failures = [each for each in found if isinstance(each, Failure)]
    unequal = [each for each in found if isinstance(each, Unequal)]
    if unequal:
        return unequal[0]
    if failures:
        return next((each for each in failures if not each.echo), failures[0])
    first: Recording = found[0]
    wanted = first.digests()
    for rank, digests in enumerate(found[1:], start=1):
        for place, value in wanted.items():
            if digests.get(place) != value:
                return Unequal(place, rank)
    return first


def _brief(text: str) -> str:
    """The last line of a traceback says what happened."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if len(lines) > 3 else "; ".join(lines)


def _train(
    rank: int, world_size: int, resolved: Resolved, dtypes: str | None, still: bool
) -> Recording | dict[str, int] | Failure | Unequal:
    """All of one rank. Rank 0 returns its recording, the others the checksums of theirs."""
    if resolved.recipe.launch.device == "cuda":
        _meet_again(world_size, f"{resolved.recipe.run.dir}-meeting")
    recorder = Recorder(still=still)
    observers: dict[str, Plugin] = {"recorder": recorder}
    if dtypes is not None:
        observers["dtypes"] = Dtypes(dtypes)
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    quiet = Quiet()
    try:
        with session(resolved, environment, RunDirectory(resolved.recipe.run.dir or ""), observers) as trainer:
            recorder.recording.plugins = tuple(trainer.host.plugins)
            trainer.train(quiet, quiet)
    except UnequalCopies as error:
        return Unequal(str(error))
    except WrongCopies as error:
        return Failure(None, str(error), told=True)
    except PluginError as error:
        return Failure(rank, str(error), error.plugin, error.hook)
    except RecipeError as error:
        return Failure(rank, str(error), _plugin_of(error), refused=True)
    except (CamshaftError, Exception) as error:
        return Failure(rank, f"{type(error).__name__}: {_brief(str(error))}")
    return recorder.recording if rank == 0 else recorder.recording.digests()


def _meet_again(world_size: int, folder: str) -> None:
    """Leave the gloo group that ranks are forked into: a session makes one for its own device, and meets in ``folder``.

    Not there yet; of this run alone.
    """
    import torch.distributed as dist

    os.environ[JOB_VARIABLE] = folder
    if world_size > 1:
        dist.destroy_process_group()


def _plugin_of(error: RecipeError) -> str:
    """The plugin that the first problem is about, told by its key."""
    words = error.problems[0].key.split(".") if error.problems else []
    return words[1] if len(words) > 1 and words[0] == "plugins" else ""
