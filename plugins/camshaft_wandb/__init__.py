"""Weights & Biases: metrics, and the resolved recipe as the run's config.

Training never meets wandb. A child process (``worker``) imports and drives it, and a thread (``client``) feeds that
process from a bounded queue, so that a wandb that is absent, slow, stuck or failing costs a step some microseconds
and nothing else. A thread alone is not enough: a login that hangs cannot be given up within a process, and wandb's
exit handler waits for uploads without a limit. Training starts at once; when the server has not accepted the run in
``start_timeout_s``, the child is replaced by one that records offline, and the metrics that waited go there.

The run's id is kept in ``<run directory>/wandb_id``: a resumed run continues its run. Every metric has
``progress/global_step`` as its axis, and wandb's own step counter is never set, because it refuses to go back when a
run is resumed from a checkpoint. Under a sweep's agent, the id, project and entity are the agent's. Claims nothing.

On demand, papers of the run go along (``artifacts``): the recipe as resolved, the certificate that ``camshaft verify``
gave it, the plan with its memory, the ledger's table and the schedule's drawing. Alerts (``alerts``) are made by the
thread from the records that pass, and from none passing; so they too cost a step nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

import camshaft
from camshaft import Plan, Problem, hookimpl
from camshaft_wandb.alerts import Alerts, Watch
from camshaft_wandb.client import Client
from camshaft_wandb.identity import public, public_text, resolve_mode, run_id
from camshaft_wandb.papers import Message, Paper, at_end, at_start

if TYPE_CHECKING:
    from camshaft.state import State

_MISSING = {
    "recipe": "this run has no recipe.yaml to upload",
    "certificate": "there is no certificate of this recipe to upload: `camshaft verify` makes one",
    "plan": "this run was not started by `camshaft train`, so there is no plan to upload",
    "ledger": "there is no ledger to upload: add plugins.ledger",
    "schedule": "there is no drawing of a schedule to upload: let the plugin that runs the schedule write one",
}
_FORBIDDEN = "/\\#?%:"
_logger = logging.getLogger("camshaft.wandb")


class Options(camshaft.Options):
    """``plugins.wandb`` of a recipe. The key is never here: it is `WANDB_API_KEY`, or what `wandb login` stored."""

    project: str | None = None
    """Default: `WANDB_PROJECT`, else the recipe's name."""
    entity: str | None = None
    """Team or user; default: the key's own."""
    name: str | None = None
    """Display name; default: the recipe's name and the run directory's."""
    group: str | None = None
    """Runs with the same group are shown together."""
    job_type: str = "train"
    """Kind of job inside the group."""
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = []
    """Labels to filter runs by."""
    notes: str | None = None
    """A longer description of the run."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online if there is a key, else offline. `WANDB_MODE` decides for `auto`, and can hold `online` back."""
    dir: str | None = None
    """Where wandb keeps its files; default: the run directory."""
    artifacts: list[Paper] = []
    """What is uploaded beside the metrics: `recipe`, `certificate`, `plan`, `ledger`, `schedule`."""
    alerts: Alerts = Alerts()
    """What W&B is to alert people of."""
    system_metrics: bool = True
    """Let wandb sample the use of GPU, CPU and memory of rank 0 and its machine."""
    start_timeout_s: Annotated[float, Field(gt=0, le=90)] = 30.0
    """Seconds that the server may take to accept the run; then it is recorded offline. Training does not wait."""
    close_timeout_s: Annotated[float, Field(gt=0, le=60)] = 8.0
    """Seconds that the end of a run waits for uploads. What is not uploaded stays on disk for `wandb sync`."""


class Plugin(camshaft.Plugin):
    """Sends records on rank 0. No hook raises because of wandb."""

    Options = Options
    draws = False
    packages: ClassVar[dict[str, str]] = {"wandb": "wandb"}

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._client: Client | None = None
        self._last: Mapping[str, float | int] = {}

    @hookimpl
    def plan(self) -> Plan:
        return Plan(problems=tuple(_project_problems(self.options.project)))

    @hookimpl
    def pre_run(self, state: State) -> None:
        mode = resolve_mode(self.options.mode, os.environ)
        if not state.world.is_main or mode == "disabled":
            return
        run = Path(state.world.run.path)
        try:
            arguments = self._init_arguments(state, run)
            Path(arguments["dir"]).mkdir(parents=True, exist_ok=True)
            self._client = Client(
                {"mode": mode, "init": public(arguments, os.environ), "settings": self._settings()},
                output=run / "logs" / "wandb.log",
                start_timeout_s=self.options.start_timeout_s,
                close_timeout_s=self.options.close_timeout_s,
                watch=Watch(self.options.alerts, f"{state.world.recipe.name} ({run.name})"),
            )
            self._send(at_start(self.options.artifacts, run, state.world.recipe.name))
        except OSError as error:
            _logger.warning("W&B is off, %s cannot be written: %s", run, error)

    @hookimpl
    def log(self, state: State, record: Mapping[str, float | int]) -> None:
        if self._client is not None:
            self._client.log(record)
            if "train/loss" in record:
                self._last = record

    @hookimpl
    def close(self, state: State, status: str) -> None:
        client = self._client
        if client is not None:
            run = Path(state.world.run.path)
            self._send(at_end(self.options.artifacts, run, state.world.recipe.name, self._last))
            self._client = None
            client.close(exit_code=0 if status == "finished" else 1)

    def _send(self, messages: Iterator[Message]) -> None:
        """Queue papers; those that are wanted and not there are told of once."""
        assert self._client is not None
        for message in messages:
            if "missing" in message:
                _logger.warning("W&B: %s", _MISSING[message["missing"]])
                continue
            content = next(iter(message.values()))
            if "files" in content:
                content["files"] = {file: public_text(text, os.environ) for file, text in content["files"].items()}
            self._client.send(message)

    def _init_arguments(self, state: State, run: Path) -> dict[str, Any]:
        """Arguments of ``wandb.init``. A sweep's agent has chosen project, entity and name: they are left to it."""
        options, recipe = self.options, state.world.recipe
        arguments = {
            "id": run_id(run / "wandb_id", os.environ),
            "resume": "allow",
            "dir": str(run / options.dir if options.dir else run),
            "group": options.group,
            "job_type": options.job_type,
            "tags": options.tags,
            "notes": options.notes,
            "config": recipe.model_dump(mode="json"),
        }
        if "WANDB_SWEEP_ID" in os.environ:
            return arguments
        project = options.project or os.environ.get("WANDB_PROJECT") or recipe.name
        name = options.name or os.environ.get("WANDB_NAME") or f"{recipe.name}-{run.name}"
        return arguments | {"project": project, "entity": options.entity, "name": name}

    def _settings(self) -> dict[str, Any]:
        """wandb's settings: nothing is printed, no code, diff or command line is uploaded."""
        return {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "disable_job_creation": True,
            "save_code": False,
            "x_disable_stats": not self.options.system_metrics,
            "x_stats_pid": os.getpid(),
            "init_timeout": self.options.start_timeout_s,
        }


def _project_problems(project: str | None) -> list[Problem]:
    if project is None or (0 < len(project) <= 128 and not set(project) & set(_FORBIDDEN)):
        return []
    return [
        Problem(
            f"W&B takes no project called '{project}': 1 to 128 characters, none of {' '.join(_FORBIDDEN)}",
            key="plugins.wandb.project",
            fix="use letters, digits, '-' and '_'",
        )
    ]
