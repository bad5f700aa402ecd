"""A sweep as the file that W&B's agents take: they choose values, and start ``camshaft train`` with each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from camshaft.errors import Problem, RecipeError
from camshaft.recipe.emit import flow
from camshaft.sweep.file import Choice, Span, Sweep

_SIGN = "# A sweep for W&B's agents, made of "
_HEAD = f"""\
{_SIGN}{{source}}. Its first line is the command that the agents start.
# Register it, then start as many agents as you like, where the recipe is:
#   wandb sweep {{target}}
#   wandb agent <what that printed>
"""
_NULL = "run it with --local, or leave null out"
_LATEST = "# W&B looks at the last value of the metric, not at its {of}.\n"


def text(sweep: Sweep, target: str) -> str:
    """The YAML text; ``target`` is how the file will be called.

    Raises:
        RecipeError: a parameter may be null, which an agent cannot say.
    """
    for key, each in sweep.file.parameters.items():
        if isinstance(each, Choice) and None in each.values:
            raise RecipeError(
                Problem("agents write null as the text None", key=f"parameters.{key}", file=str(sweep.path), fix=_NULL)
            )
    head = _HEAD.format(source=sweep.path.name, target=target)
    if sweep.file.metric.of != "last":
        head += _LATEST.format(of=sweep.file.metric.of)
    lines = []
    for key, value in config(sweep).items():
        if key == "parameters":
            lines += [f"{key}:", *(f"  {name}: {flow(each)}" for name, each in value.items())]
        else:
            lines.append(f"{key}: {flow(value)}")
    return head + "\n".join(lines) + "\n"


def is_ours(path: Path) -> bool:
    """Whether a file is one that was written here before, by its first line.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(_SIGN)) == _SIGN.encode()


def config(sweep: Sweep) -> dict[str, Any]:
    """The sweep as W&B's configuration (https://docs.wandb.ai/guides/sweeps/sweep-config-keys)."""
    file = sweep.file
    words = ["${interpreter}", "-m", "camshaft", "train", str(sweep.recipe), *file.overrides, "${args_no_hyphens}"]
    found: dict[str, Any] = {
        "command": ["${env}", *words],
        "program": "camshaft",
        "name": file.name,
        "method": file.method,
        "metric": {"name": file.metric.name, "goal": file.metric.goal},
    }
    if file.trials is not None:
        found["run_cap"] = file.trials
    if file.pruning is not None:
        found["early_terminate"] = {"type": "hyperband", "min_iter": max(file.pruning.warmup_steps, 1)}
    found["parameters"] = {name: _parameter(each) for name, each in file.parameters.items()}
    return found


def _parameter(each: Span | Choice) -> dict[str, Any]:
    if isinstance(each, Choice) or each.step is not None:
        return {"values": each.grid()}  # its steps would start at 0, ours start at min
    bounds: dict[str, Any] = {"min": each.min, "max": each.max}
    if each.log and each.whole:
        return {"distribution": "q_log_uniform_values", "q": 1, **bounds}
    if each.log:
        return {"distribution": "log_uniform_values", **bounds}
    return {"distribution": "int_uniform" if each.whole else "uniform", **bounds}
