"""The life of a run on one rank: connect, build, load, step until done, log, evaluate, save, close."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from camshaft import bind, effects
from camshaft.build import SINGLE, bind_plugins, build
from camshaft.data import prepare
from camshaft.data.loader import Loader
from camshaft.distributed import Control, check_agreement, connect, disconnect, pick_device
from camshaft.errors import (
    CamshaftError,
    Interrupted,
    NonFiniteLoss,
    OutOfMemory,
    PluginError,
    RecipeError,
    is_out_of_memory,
)
from camshaft.host import Host, distribution, installed
from camshaft.host_memory import keep_freed_memory
from camshaft.mesh import Mesh
from camshaft.meter import Meter
from camshaft.recipe import check
from camshaft.recipe.checks import AUTO
from camshaft.recipe.length import sample_limit, total_steps
from camshaft.state import Component, State, World
from camshaft.step import Stepper

if TYPE_CHECKING:
    from camshaft.data import Prepared
    from camshaft.distributed import Environment
    from camshaft.plugin import Plugin
    from camshaft.recipe import Checked, Resolved
    from camshaft.recipe.schema import Recipe
    from camshaft.rundir import RunDirectory

_log = logging.getLogger(__name__)

SAME_POLICY = "other dtypes than rank 0: their hardware makes `auto` choose otherwise. Name the precision in the recipe"

Closing = Callable[[State, "Prepared"], None]


class Heartbeat(Protocol):
    """Where a rank shows how far it is."""

    def beat(self, step: int, phase: str) -> None:
        """Note step and phase; must cost next to nothing."""


class StopSignal(Protocol):
    """Whether this rank was asked to stop."""

    @property
    def requested(self) -> int:
        """How often; 0 for never."""


def run(
    resolved: Resolved,
    environment: Environment,
    directory: RunDirectory,
    heartbeat: Heartbeat,
    stop: StopSignal,
    closing: Closing | None = None,
) -> int:
    """Train one rank to the end of the recipe and return 0.

    ``closing`` is called on rank 0 at the end, after every plugin has closed; the model still exists.

    Raises:
        Interrupted: asked to stop, and stopped after a checkpoint.
        NonFiniteLoss: loss or gradient norm is NaN or infinite.
        OutOfMemory: device or host memory ran out.
    """
    with out_of_memory(), session(resolved, environment, directory) as trainer:
        trainer.train(heartbeat, stop)
    if closing is not None and trainer.state.world.is_main:
        closing(trainer.state, trainer.data)
    return 0


@contextlib.contextmanager
def session(
    resolved: Resolved,
    environment: Environment,
    directory: RunDirectory,
    observers: Mapping[str, Plugin] | None = None,
) -> Iterator[Trainer]:
    """Everything that a run needs, built and loaded; closed again whatever happens inside.

    ``observers`` are plugins beside the recipe's own, after them in order: probes of tests and of proofs.
    """
    device = pick_device(resolved.recipe.launch, environment)
    checked = check(resolved, environment.world_size, device=device.type, observers=observers).require()
    if resolved.recipe.batch.micro_batch_size == AUTO:
        fix = "give a number; `camshaft train` finds one where it starts the ranks itself"
        raise RecipeError(resolved.problem("batch.micro_batch_size", "auto was not resolved before the run", fix))
    if device.type == "cpu" and resolved.recipe.launch.keep_freed_memory:
        keep_freed_memory()
    connect(environment, device.type, resolved.recipe.launch.group_timeout_s)
    trainer: Trainer | None = None
    status = "failed"
    try:
        check_agreement(environment, fingerprint(resolved))
        data = prepare(resolved)
        host = Host.of(resolved.recipe.plugins, observers)
        trainer = Trainer(host, resolved.recipe, environment, directory, device, data, checked)
        trainer.open()
        yield trainer
        status = "finished"
    except Interrupted:
        status = "interrupted"
        raise
    except RecipeError as error:
        raise RecipeError([resolved.placed(problem) for problem in error.problems]) from None
    finally:
        try:
            if trainer is not None:
                trainer.close(status)
        finally:  # also when a plugin's close raised: the other ranks wait for this one to leave
            disconnect(failed=status == "failed")


def fingerprint(resolved: Resolved) -> str:
    """Digest of what must be equal on all ranks: the resolved recipe, the versions of torch, core and plugins."""
    points = installed()
    versions = [distribution(points[name]) for name in resolved.recipe.plugins if name in points]
    return hashlib.sha256("\n".join([resolved.dump(), str(torch.__version__), *versions]).encode()).hexdigest()


class Trainer:
    """A built run on one rank."""

    def __init__(
        self,
        host: Host,
        recipe: Recipe,
        environment: Environment,
        directory: RunDirectory,
        device: torch.device,
        data: Prepared,
        checked: Checked,
    ) -> None:
        if device.type == "cpu" or recipe.training.deterministic:
            # cuBLAS reads this when it makes a handle, and torch refuses matrix products without it.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        assert checked.mesh is not None and checked.batch is not None and checked.config is not None
        mesh = Mesh.connect(checked.mesh, environment.rank, device.type, recipe.launch.group_timeout_s)
        batch = checked.batch
        self.data = data
        samples = sample_limit(recipe, len(data.train))
        world = World(
            recipe=recipe,
            mesh=mesh,
            rank=environment.rank,
            world_size=environment.world_size,
            device=device,
            policy=SINGLE,
            batch=batch,
            run=directory,
            total_steps=total_steps(recipe, samples, batch.global_batch_size),
        )
        part = checked.mesh.batch_index(environment.rank)
        loader = Loader(
            data.train,
            batch,
            index=part,
            degree=checked.mesh.batch_degree,
            seed=recipe.seed,
            stop=samples,
            device=device,
        )
        self.host = host
        self.control = Control(environment, recipe.launch.group_timeout_s)
        self.state, program = build(self.host, world, checked.config, checked.plans, loader, self.control)
        check_agreement(environment, f"{world.policy}", SAME_POLICY)
        self.state.data_fingerprint = data.fingerprint
        self.state.components = components(self.host, self.state)
        self._plans = checked.plans
        if recipe.debug.contracts:
            from camshaft.contracts import Contracts

            self.host.watch = Contracts(self.state, checked.plans)
        self.stepper = Stepper(self.host, self.state, program)
        self.meter = Meter(self.state)
        self._log = bind.event(self.host, "log")
        self._save = bind.slot(self.host, "save")

    def open(self) -> None:
        """Let plugins take their references, continue an earlier run if there is one, open trackers."""
        state = self.state
        bind_plugins(self.host, state, self._plans)
        load = bind.slot(self.host, "load")
        if load is not None and load(state):
            if state.masters is not None:
                state.masters.give_weights()
            self.host.call("post_load", state)
        state.loader.seek(state.consumed_samples)
        self.meter.start()
        self.host.call("pre_run", state)

    def train(self, heartbeat: Heartbeat, stop: StopSignal) -> None:
        """Step until the recipe's end.

        Raises:
            Interrupted: after the checkpoint that a stop asks for.
            RecipeError: a plugin did nothing in the first step.
        """
        state, training = self.state, self.state.world.recipe.training
        total, stopped, asked = state.world.total_steps, False, False
        if state.step >= total:
            _log.warning("nothing left to do: the run is at step %d, and the recipe ends at step %d", state.step, total)
        if state.step == 0 and training.eval_every is not None:
            self.evaluate()
        while state.step < total:
            heartbeat.beat(state.step, "data")
            state.window = state.loader.next()
            if state.window is None:
                break
            heartbeat.beat(state.step, "step")
            self.stepper.run(stop.requested > 0, heartbeat.beat)
            self.meter.count(state.window.tokens)
            stopped = self.stepper.stop_votes > 0 and state.step < total  # in the last step there is nothing to stop
            last = stopped or state.step == total
            if state.step % training.log_every == 0 or last:
                heartbeat.beat(state.step, "log")
                self.log()
            if training.eval_every is not None and not stopped and (state.step % training.eval_every == 0 or last):
                heartbeat.beat(state.step, "evaluate")
                self.evaluate()
            # After the records: a checkpoint of this step means that its records are written, so none is lost.
            self.stepper.post_step(state)
            if not asked:
                asked = True
                heartbeat.beat(state.step, "step")
                effects.check(self.host, state, self.stepper.actors)
            if stopped:
                break
        heartbeat.beat(state.step, "save")
        if self._save is not None:
            self._save(state)
        if stopped:
            written = "a checkpoint was written, and the same command goes on from it"
            kept = "no checkpoint plugin is enabled" if self._save is None else written
            raise Interrupted(f"asked to stop after step {state.step}; {kept}")

    def log(self) -> None:
        """Make the record of the step just done, refuse non-finite values, give it to the trackers."""
        record = self.meter.record()
        for name in ("train/loss", "train/grad_norm"):
            if not math.isfinite(record.get(name, 0.0)):
                self._emit(record)
                raise NonFiniteLoss(
                    f"{name} is {record[name]} at step {self.state.step} (checked every "
                    f"{self.state.world.recipe.training.log_every} steps). Lower the learning rate, lengthen the "
                    "warm-up, or look at the data of this step. A checkpoint of such a state is never written"
                )
        self._emit(record)

    def evaluate(self) -> None:
        """Loss, perplexity and bits per byte over ``eval_samples`` samples, evenly spread over the validation set."""
        record = self.meter.evaluate(self.stepper.strokes.call, self.data)
        if record is not None:
            self._emit(record)

    def _emit(self, record: dict[str, float | int]) -> None:
        if self._log is not None:
            self._log(self.state, record)

    def close(self, status: str) -> None:
        """Call every ``close`` in reverse order; one that raises does not keep the others from closing."""
        faults = []
        for _, function in reversed(self.host.implementations("close")):
            try:
                function(self.state, status)
            except Exception as error:  # all of them must close; the first fault is raised below
                faults.append(error)
                _log.error("while closing: %s", error)
        self.stepper.strokes.close()
        self.state.loader.close()
        self.control.close()
        if faults and status != "failed":
            raise faults[0]


def components(host: Host, state: State) -> list[Component]:
    """(plugin, state_dict, load_state_dict) of each plugin with state of its own."""
    loaders = dict(host.implementations("load_state_dict"))
    found: list[Component] = []
    for name, function in host.implementations("state_dict"):
        if name not in loaders:
            raise PluginError(name, "state_dict", "saves state, but has no load_state_dict to take it back")
        found.append((name, partial(function, state), partial(loaders[name], state)))
    return found


@contextlib.contextmanager
def out_of_memory() -> Iterator[None]:
    """Tell running out of memory apart from other errors, and say what to change."""
    try:
        yield
    except CamshaftError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        text = str(error)
        raise OutOfMemory(
            f"out of memory: {text.splitlines()[0] if text else type(error).__name__}. "
            "Lower batch.micro_batch_size (the global batch stays the same), or data.sequence_length"
        ) from error
