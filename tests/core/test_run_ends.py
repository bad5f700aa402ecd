"""How a run ends when something goes wrong: who is told, what is closed, what has which status."""

import pytest
import torch
import torch.distributed as dist
from run_stand_ins import Asked, Raises

from camshaft import loop
from camshaft.distributed import Environment
from camshaft.errors import Interrupted, MachineError, NonFiniteLoss, OutOfMemory, PluginError
from camshaft.loop import out_of_memory, run, session
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.state import Policy
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet

SETTINGS = {"sgd": {"lr": 0.1}, "clip": {"max_norm": 1.0}, "precision": {"compute": "fp32"}}
TRAINING = {"max_steps": 1, "log_every": 1}


class Closes(Plugin):
    """Writes down that it was closed; may raise."""

    def __init__(self, log, tag, error=None):
        super().__init__()
        self.log, self.tag, self.error = log, tag, error

    @hookimpl
    def inert(self): ...

    @hookimpl
    def close(self, status):
        self.log.append((self.tag, status))
        if self.error is not None:
            raise self.error


def train(resolved, observers, stop=None, environment=None):
    directory = RunDirectory(resolved.recipe.run.dir)
    with session(resolved, environment or Environment(), directory, observers) as trainer:
        trainer.train(Quiet(), stop or Quiet())


class Wide(Plugin):
    @hookimpl
    def precision(self, world):
        return Policy(*[torch.float64] * 4)


def other_dtypes_on_rank_one(rank, world_size, resolved):
    environment = Environment(rank, rank, world_size, world_size, "torchrun")
    with pytest.raises(MachineError) as caught:
        train(resolved, {"wide": Wide()} if rank == 1 else {}, environment=environment)
    return str(caught.value)


def test_ranks_that_chose_other_dtypes_are_refused_on_every_rank(make_recipe):
    settings = {name: options for name, options in SETTINGS.items() if name != "precision"}
    resolved = make_recipe(settings, 2, training=TRAINING)
    told = run_ranks(2, other_dtypes_on_rank_one, resolved)
    assert told[0] == told[1] and told[0].startswith("rank(s) 1 have other dtypes than rank 0")


def test_all_plugins_close_in_reverse_order_and_the_first_fault_is_told(make_recipe):
    log = []
    observers = {
        "one": Closes(log, "one", ValueError("of one")),
        "two": Closes(log, "two", ValueError("of two")),
        "three": Closes(log, "three"),
    }
    with pytest.raises(PluginError, match="plugin 'two', hook 'close': ValueError: of two"):
        train(make_recipe(SETTINGS, training=TRAINING), observers)
    assert log == [("three", "finished"), ("two", "finished"), ("one", "finished")]


def test_a_fault_while_closing_never_hides_the_fault_that_ended_the_run(make_recipe):
    log = []
    observers = {"first": Raises(ValueError("the cause")), "second": Closes(log, "second", ValueError("of close"))}
    with pytest.raises(PluginError, match="plugin 'first', hook 'pre_forward': ValueError: the cause"):
        train(make_recipe(SETTINGS, training=TRAINING), observers)
    assert log == [("second", "failed")]


def test_an_interrupt_from_the_keyboard_closes_everything(make_recipe):
    log = []
    observers = {"first": Raises(KeyboardInterrupt()), "second": Closes(log, "second")}
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(SETTINGS, training=TRAINING), observers)
    assert log == [("second", "failed")]


def test_a_stop_closes_as_interrupted(make_recipe):
    log = []
    with pytest.raises(Interrupted):
        train(make_recipe(SETTINGS, training={"max_steps": 9, "log_every": 1}), {"c": Closes(log, "c")}, Asked())
    assert log == [("c", "interrupted")]


def close_fails_on_rank_one(rank, world_size, resolved):
    environment = Environment(rank, rank, world_size, world_size, "torchrun")
    observers = {"bad": Closes([], "bad", ValueError("disk full") if rank == 1 else None)}
    try:
        train(resolved, observers, environment=environment)
    except PluginError as error:
        return str(error), dist.is_initialized()
    return "fine", dist.is_initialized()


def test_a_rank_whose_plugin_fails_to_close_leaves_the_group_all_the_same(make_recipe):
    resolved = make_recipe(SETTINGS, 2, training=TRAINING)
    fine, failed = run_ranks(2, close_fails_on_rank_one, resolved, timeout_s=30)
    assert fine == ("fine", False)
    assert failed == ("plugin 'bad', hook 'close': ValueError: disk full", False)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_inside_a_hook_is_no_fault_of_the_plugin(make_recipe, error):
    with pytest.raises(OutOfMemory, match=r"batch\.micro_batch_size"), out_of_memory():
        train(make_recipe(SETTINGS, training=TRAINING), {"hungry": Raises(error)})


def test_other_errors_are_not_taken_for_memory(make_recipe):
    with pytest.raises(PluginError, match="RuntimeError: shapes do not fit"), out_of_memory():
        train(make_recipe(SETTINGS, training=TRAINING), {"broken": Raises(RuntimeError("shapes do not fit"))})
    with pytest.raises(RuntimeError, match="shapes do not fit"), out_of_memory():
        raise RuntimeError("shapes do not fit")


def test_deterministic_algorithms_get_the_workspace_that_cublas_needs(make_recipe, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "set so that it is restored")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    train(make_recipe(SETTINGS, training={**TRAINING, "deterministic": True}), {})
    assert loop.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()


class Explodes(Plugin):
    """Makes one gradient infinite in the step after ``at``; the loss of that step is still finite."""

    def __init__(self, at):
        super().__init__()
        self.at, self.seen = at, []

    @hookimpl
    def reduce(self, state):
        if state.step == self.at:
            state.model.model.norm.weight.grad[0] = float("inf")

    @hookimpl
    def log(self, state, record):
        self.seen.append((state.step, record["train/grad_norm"]))


def test_an_infinite_gradient_ends_the_run_while_the_loss_is_finite_and_trackers_see_it(make_recipe):
    explodes = Explodes(1)
    with pytest.raises(NonFiniteLoss, match="train/grad_norm is inf at step 2") as caught:
        train(make_recipe(SETTINGS, training={"max_steps": 9, "log_every": 1}), {"explodes": explodes})
    assert caught.value.exit_status == 5
    assert [step for step, _ in explodes.seen] == [1, 2] and explodes.seen[-1][1] == float("inf")


class Saves(Plugin):
    """Owns ``save`` and ``load``: remembers when it was asked, and starts at a given sample."""

    def __init__(self, start=0):
        super().__init__()
        self.start, self.saved, self.first_rows = start, [], []

    @hookimpl
    def load(self, state):
        state.step, state.consumed_samples = self.start, 12 * self.start
        return self.start > 0

    @hookimpl
    def save(self, state):
        self.saved.append((state.step, state.consumed_samples))

    @hookimpl
    def pre_forward(self, state, batch):
        self.first_rows.append(batch.tokens[0].tolist())


def test_the_end_and_a_stop_are_saved_and_a_loaded_run_reads_on_where_it_was(make_recipe):
    resolved = make_recipe(SETTINGS, accumulation=1, training={"max_steps": 3, "log_every": 9})
    whole, stopped, later = Saves(), Saves(), Saves(2)
    train(resolved, {"saves": whole})
    assert whole.saved == [(3, 36)] and len(whole.first_rows) == 3
    with pytest.raises(Interrupted, match="after step 1; a checkpoint was written"):
        train(resolved, {"saves": stopped}, Asked())
    assert stopped.saved == [(1, 12)]
    train(resolved, {"saves": later})
    assert later.saved == [(3, 36)] and later.first_rows == whole.first_rows[2:]


class LogsSteps(Plugin):
    def __init__(self):
        super().__init__()
        self.steps = []

    @hookimpl
    def inert(self): ...

    @hookimpl
    def log(self, state):
        self.steps.append(state.step)


def test_the_last_step_and_a_step_that_is_stopped_are_logged_whatever_the_interval(make_recipe):
    logs = LogsSteps()
    train(make_recipe(SETTINGS, training={"max_steps": 5, "log_every": 2}), {"logs": logs})
    assert logs.steps == [2, 4, 5]
    logs = LogsSteps()
    with pytest.raises(Interrupted):
        train(make_recipe(SETTINGS, training={"max_steps": 5, "log_every": 2}), {"logs": logs}, Asked())
    assert logs.steps == [1]


def disagree(rank, world_size, resolved, other):
    environment = Environment(rank, rank, world_size, world_size, "torchrun")
    try:
        train(resolved if rank == 0 else other, {}, environment=environment)
    except MachineError as error:
        return str(error)
    return "trained"


def test_ranks_with_different_recipes_never_train_together(make_recipe):
    resolved = make_recipe(SETTINGS, 2, training=TRAINING)
    other = make_recipe({**SETTINGS, "sgd": {"lr": 0.2}}, 2, training=TRAINING)
    for told in run_ranks(2, disagree, resolved, other, timeout_s=30):
        assert "rank(s) 1 have another recipe" in told


def main_closes(rank, world_size, resolved):
    environment = Environment(rank, rank, world_size, world_size, "torchrun")
    shown = []
    directory = RunDirectory(resolved.recipe.run.dir)
    run(resolved, environment, directory, Quiet(), Quiet(), lambda *given: shown.append(len(given)))
    return shown


def test_only_rank_0_shows_the_closing(make_recipe):
    assert run_ranks(2, main_closes, make_recipe(SETTINGS, 2, training=TRAINING), timeout_s=30) == [[2], []]
