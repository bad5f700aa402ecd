"""Options of the plugin, and what can be wrong with them. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from camshaft.errors import Problem
from camshaft.plugin import Options


class CheckpointOptions(Options):
    """Section ``checkpoint`` of a recipe."""

    model_config = ConfigDict(populate_by_name=True)

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Save after every so many steps. Without it only at the end and when the run is asked to stop."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """How many intact checkpoints to keep; older ones are removed after the new one is complete."""
    keep_every: Annotated[int, Field(ge=1)] | None = None
    """Checkpoints of steps that this divides are kept for ever."""
    async_save: Annotated[bool, Field(alias="async")] = False
    """Copy to CPU memory, go on training, and write in the background."""
    resume: Annotated[str, Field(min_length=1)] = "auto"
    """`auto`: continue from the newest intact checkpoint of this run's folder; `never`: refuse to; or the path of a
    checkpoint, of a folder of them or of a run, that a run without checkpoints of its own starts from. Relative to the
    working directory."""
    save_at_end: bool = True
    """Also save when training has reached its last step."""
    on_error: Literal["stop", "continue"] = "stop"
    """What to do when a periodic checkpoint cannot be written (disk full): stop the run, or log it and go on."""


def problems(options: CheckpointOptions, last: int | None, key: str) -> Iterator[Problem]:
    """Options that would do nothing or contradict each other; ``key`` is the plugin's place in the recipe.

    ``last``: step at which training ends, where that is known.
    """
    every = options.every_steps
    if every is None and not options.save_at_end:
        yield Problem(
            "nothing would be saved: there is no every_steps, and save_at_end is off",
            key=f"{key}.every_steps",
            fix=f"set {key}.every_steps=100",
        )
    if every is None and options.async_save:
        yield Problem(
            "async concerns periodic checkpoints, and there is no every_steps",
            key=f"{key}.async",
            fix=f"set {key}.every_steps=100, or remove async",
        )
    if every is not None and last is not None and every > last and not options.save_at_end:
        yield Problem(
            f"nothing would be saved: every_steps is {every}, training ends after {last}, and save_at_end is off",
            key=f"{key}.every_steps",
            fix=f"set {key}.every_steps to {last} or less",
        )
    if options.keep_every is not None and (every is None or options.keep_every % every):
        yield Problem(
            f"keep_every is {options.keep_every}, and checkpoints are written every {every} steps:"
            " it must be a multiple",
            key=f"{key}.keep_every",
            fix=f"set {key}.keep_every={(every or 100) * 10}" + ("" if every else f" and {key}.every_steps=100"),
        )
    if options.resume not in ("auto", "never") and not os.path.isdir(options.resume):  # noqa: PTH112  (any text)
        yield Problem(
            f"there is no folder {options.resume}",
            key=f"{key}.resume",
            fix="give a step_N folder or a folder of checkpoints, or one of auto, never",
        )
