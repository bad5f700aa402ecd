"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no state.

cosine (Loshchilov & Hutter, arXiv:1608.03983), linear, exponential, WSD (warm-up, stable, decay: MiniCPM,
arXiv:2404.06395) and constant, each after a linear warm-up. Claims nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

import camshaft
from camshaft.recipe.length import known_steps

if TYPE_CHECKING:
    from camshaft.state import State


class Options(camshaft.Options):
    """Shape of the learning rate over the run."""

    type: Literal["cosine", "linear", "exponential", "wsd", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up; step n of them runs at n / warmup_steps of the peak, the first at 1 / warmup_steps."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The warm-up as a part of all steps, instead of `warmup_steps`."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where the decay ends, as a part of the peak; above 0 for `exponential`."""
    decay_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps from the end of the warm-up to the end of the decay; default: up to the last step. Not for `wsd`."""
    wsd_decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Part of all steps that the decay of `wsd` takes, at the end."""


class Plugin(camshaft.Plugin):
    """Learning rate over the run: cosine, linear, exponential, WSD or constant, with warm-up."""

    Options = Options
    draws = False

    @camshaft.hookimpl
    def plan(self, context: camshaft.PlanContext) -> camshaft.Plan:
        """Refuse a warm-up longer than the run, options that the type does not read, and a rate that never changes."""
        options, key = self.options, f"plugins.{self.name}"
        steps = known_steps(context.recipe)
        problems = [] if steps is None else self._against_length(steps)
        if not _changes(options):
            problems.append(
                camshaft.Problem(
                    "the learning rate has the factor 1 in every step, as it has without a schedule",
                    key=key,
                    fix=f"remove {key}, give it a warm-up, or a type that decays",
                )
            )
        if options.warmup_ratio is not None and "warmup_steps" in options.model_fields_set:
            problems.append(
                camshaft.Problem(
                    "warmup_ratio and warmup_steps are both given", key=f"{key}.warmup_ratio", fix="remove one of them"
                )
            )
        if options.type == "exponential" and options.min_lr_ratio == 0:
            problems.append(
                camshaft.Problem(
                    "an exponential decay never reaches 0",
                    key=f"{key}.min_lr_ratio",
                    fix="set it above 0, e.g. 0.01",
                )
            )
        unread = {"wsd_decay_ratio"} if options.type != "wsd" else {"decay_steps"}
        if options.type == "constant":
            unread = {"wsd_decay_ratio", "decay_steps", "min_lr_ratio"}
        problems += [
            camshaft.Problem(
                f"type '{options.type}' does not read '{name}'",
                key=f"{key}.{name}",
                fix="remove it, or change the type",
            )
            for name in sorted(unread & options.model_fields_set)
        ]
        return camshaft.Plan(problems=tuple(problems))

    @camshaft.hookimpl
    def bind(self, state: State) -> None:
        """Take the length of the run.

        Raises:
            RecipeError: the warm-up does not fit; only the data told how long a run of epochs or tokens is.
        """
        self.total = state.world.total_steps
        problems = self._against_length(self.total)
        if problems:
            raise camshaft.RecipeError(problems)

    def _against_length(self, steps: int) -> list[camshaft.Problem]:
        """What does not fit into a run of ``steps`` steps: the warm-up, or the decay of ``wsd`` after it."""
        options, key = self.options, f"plugins.{self.name}"
        warmup = options.warmup_steps
        if options.warmup_ratio is None and warmup >= steps:
            return [
                camshaft.Problem(
                    f"a warm-up of {warmup} steps does not end within the run's {steps} steps",
                    key=f"{key}.warmup_steps",
                    fix=f"set it below {steps}, for example {steps // 10}, or lengthen the run",
                )
            ]
        if options.warmup_ratio is not None:
            warmup = round(options.warmup_ratio * steps)
        decay = max(round(options.wsd_decay_ratio * steps), 1)
        if options.type == "wsd" and warmup and warmup + decay > steps:
            return [
                camshaft.Problem(
                    f"a warm-up of {warmup} and a decay of {decay} steps do not fit into the run's {steps} steps:"
                    " the rate would jump where they meet",
                    key=f"{key}.wsd_decay_ratio",
                    fix="lower it, or shorten the warm-up",
                )
            ]
        return []

    @camshaft.hookimpl
    def lr(self, step: int) -> float:
        """Factor for step ``step``; pure."""
        from camshaft_lr_schedule.shapes import factor

        return factor(self.options, step, self.total)


def _changes(options: Options) -> bool:
    """Whether the factor differs from 1 anywhere in a long run; a short one may end before it does."""
    warms_up = options.warmup_steps > 1 or bool(options.warmup_ratio)
    return warms_up or (options.type != "constant" and options.min_lr_ratio < 1)
