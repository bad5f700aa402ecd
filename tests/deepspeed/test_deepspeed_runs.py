"""Whole runs: offload, evaluation, resuming under other rows, parameters used now and then, and what is left behind."""

import copy
import logging
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed_cases import BF16, FP32, Variant, plugins, reference

from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft.testing.record import Probe, assemble
from camshaft.testing.run import Quiet, record_ranks

pytestmark = pytest.mark.broad

SHORT = {"training": {"max_steps": 6, "log_every": 1}}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_to_the_cpu_changes_nothing(make_recipe, stage):
    both = {"offload_parameters": "cpu"} if stage == 3 else {}
    runs = [
        record_ranks(make_recipe(plugins(stage, **options), 2, **SHORT), 2)[0]
        for options in ({}, {"offload_optimizer": "cpu", **both})
    ]
    assert_bit_equal(*runs)


class Disk:
    """Stands for the handle of DeepSpeed's extension over libaio: the same calls, done at once."""

    def __init__(self, **settings):
        self.pending = 0

    def async_pwrite(self, buffer, path, offset):
        buffer.detach().numpy().tofile(path)
        self.pending += 1
        return 0

    def async_pread(self, buffer, path, offset):
        buffer.copy_(torch.from_file(path, size=buffer.numel(), dtype=buffer.dtype))
        self.pending += 1
        return 0

    def wait(self):
        done, self.pending = self.pending, 0
        return done

    def new_cpu_locked_tensor(self, size, like):
        return torch.zeros(size, dtype=like.dtype)

    def is_pinned(self, buffer):
        return True


LARGER = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_hidden_layers": 1,
}
"""Its shards reach the megabyte from which DeepSpeed writes one to a disk."""


@pytest.fixture
def disk(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    monkeypatch.setattr(AsyncIOBuilder, "load", lambda self, verbose=False: SimpleNamespace(aio_handle=Disk))


def on_disk(make_recipe, tmp_path, **options):
    model = make_recipe(plugins()).tree["model"] | LARGER
    chosen = {**plugins(3, reduce_bucket_size=10**6, persistence_threshold=0, **options), "lr_schedule": None}
    return make_recipe(chosen, 2, model=model, training={"max_steps": 3, "log_every": 1})


def test_parameters_on_a_disk_change_nothing(make_recipe, tmp_path, disk):
    place = {"offload_parameters": "nvme", "nvme_path": str(tmp_path / "disk")}
    runs = []
    seen = Files(tmp_path / "disk")
    for options in ({}, place, {**place, "offload_optimizer": "cpu"}):
        runs.append(record_ranks(on_disk(make_recipe, tmp_path, **options), 2, {"files": seen})[0])
    assert_bit_equal(runs[0], runs[1])
    assert_bit_equal(runs[0], runs[2])
    assert not list((tmp_path / "disk").rglob("*.swp")), "files are left"


def test_a_frozen_parameter_on_a_disk_is_refused(make_recipe, tmp_path, disk):
    place = {"offload_parameters": "nvme", "nvme_path": str(tmp_path / "disk")}
    resolved = on_disk(make_recipe, tmp_path, **place)
    with pytest.raises(RankFailed, match="does not train, and DeepSpeed keeps it on a disk"):
        record_ranks(resolved, 2, {"variant": Variant(frozen=("up_proj",))})


class Files(Plugin):
    """Sees that something is on the disk while the run lasts, where anything is to be."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    @hookimpl
    def post_step(self, state):
        wanted = state.world.recipe.plugins["deepspeed"].offload_parameters == "nvme"
        assert any(self.folder.rglob("*.swp")) == wanted


class Reader(torch.nn.Module):
    """Uses a parameter in a module of its own, so that stage 3 gathers it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(7, device="meta"))

    def forward(self, loss):
        return loss + (self.weight * 3).sum() * loss.detach()


class Now(Plugin):
    """A parameter that some forwards use and others do not."""

    def __init__(self, used):
        super().__init__()
        self.used = used

    @hookimpl
    def build_model(self, config):
        self.model = Llama(config)
        self.model.reader = Reader()
        self.model.register_forward_hook(self.after)
        return self.model

    @hookimpl
    def bind(self, state):
        self.state = state

    def after(self, model, inputs, loss):
        state = self.state
        use = torch.is_grad_enabled() and self.used(state.world.rank, state.step, state.microbatch)
        return model.reader(loss) if use else loss


def in_even_windows(rank, step, microbatch):
    return step % 2 == 0


def early_in_a_window(rank, step, microbatch):
    return step % 2 == 0 and microbatch == 0


def on_rank_0(rank, step, microbatch):
    return rank == 0


@pytest.mark.parametrize("used", [in_even_windows, early_in_a_window])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_that_is_used_now_and_then(make_recipe, stage, used):
    """A window that does not use it leaves it and its moments alone, and adds up nothing stale."""
    alone = record_ranks(make_recipe(plugins(), 1, **SHORT), 1, {"now": Now(used)})[0]
    ranks = record_ranks(make_recipe(plugins(stage), 2, **SHORT), 2, {"now": Now(used)})
    without = [record.step for record in ranks[0] if record.gradients["reader.weight"] is None]
    assert without == [2, 4, 6], "the case is none"
    assert_within(compare(ranks[0], alone), FP32)


@pytest.mark.parametrize(("stage", "options"), [(1, {"overlap_comm": True}), (2, {"offload_optimizer": "cpu"})])
def test_a_gradient_that_deepspeed_would_lose_is_named(make_recipe, stage, options):
    resolved = make_recipe(plugins(stage, **options), 2, **SHORT)
    with pytest.raises(RankFailed, match=r"did not use 'reader\.weight', and an earlier one did"):
        record_ranks(resolved, 2, {"now": Now(early_in_a_window)})


def test_ranks_that_use_different_parameters(make_recipe):
    """Stage 0 sums what there is; the others would mix up gradients, and say so."""
    found = record_ranks(make_recipe(plugins(0), 2, **SHORT), 2, {"now": Now(on_rank_0)})
    assert all(record.gradients["reader.weight"] is not None for record in found[1])
    with pytest.raises(RankFailed, match=r"some ranks used 'reader\.weight'"):
        record_ranks(make_recipe(plugins(2, reduce_bucket_size=10**6), 2, **SHORT), 2, {"now": Now(on_rank_0)})


class Evaluations(Plugin):
    """Keeps what evaluation records."""

    def __init__(self):
        super().__init__()
        self.seen = []

    @hookimpl
    def log(self, record):
        if "eval/loss" in record:
            self.seen.append(record["eval/loss"])


def evaluate(rank, world_size, resolved):
    seen = Evaluations()
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), {"seen": seen}) as trainer:
        trainer.train(Quiet(), Quiet())
    return seen.seen


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_between_steps(make_recipe, stage):
    def recipe(chosen, world_size):
        chosen = {**chosen, "lr_schedule": None}
        data = make_recipe(plugins()).tree["data"] | {"validation_fraction": 0.1}
        training = {"max_steps": 4, "log_every": 1, "eval_every": 2, "eval_samples": 8}
        return make_recipe(chosen, world_size, data=data, training=training)

    (alone,) = run_ranks(1, evaluate, recipe(plugins(), 1))
    for found in run_ranks(2, evaluate, recipe(plugins(stage), 2)):
        assert len(found) == len(alone) == 3
        assert found == pytest.approx(alone, rel=1e-5)


PRECISIONS = [{"compute": "fp32"}, {"compute": "bf16", "parameters": "bf16"}]
ROWS = [(1, 3), (3, None), (None, 3), (2, 1)]


@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("first", "second"), ROWS)
def test_a_checkpoint_of_one_row_goes_on_in_another(make_recipe, first, second, precision, tmp_path):
    """Saved by 2 ranks after 3 steps, continued by another row to step 6, against 6 steps in one go."""

    def chosen(stage):
        schedule = {"type": "constant", "warmup_steps": 2}
        return {**plugins(stage, "slow", precision), "checkpoint": {}, "lr_schedule": schedule}

    def part(stage, steps):
        world_size = 1 if stage is None else 2
        sections = {"training": {"max_steps": steps, "log_every": 1}, "run": {"dir": str(tmp_path / "same")}}
        return record_ranks(make_recipe(chosen(stage), world_size, **sections), world_size)[0]

    alone = record_ranks(make_recipe({**chosen(None), "checkpoint": None}, 1, **SHORT), 1)[0]
    records = part(first, 3) + part(second, 6)
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]
    assert_within(compare(records, alone), FP32 if precision["compute"] == "fp32" else BF16)


class Peaks(Plugin):
    """Largest sum of elements of the model's parameters that are on this rank at once, at every `Init` of DeepSpeed."""

    def __init__(self):
        super().__init__()
        self.live = []

    @hookimpl
    def recompute(self, world, model):
        self.parameters = list(model.parameters())
        plain = torch.utils.swap_tensors

        def counted(one, other):
            plain(one, other)
            self.live.append(sum(p.numel() for p in self.parameters if p.device.type != "meta"))

        torch.utils.swap_tensors = counted
        self.undo = lambda: setattr(torch.utils, "swap_tensors", plain)

    @hookimpl
    def bind(self):
        self.undo()


def materialized(rank, world_size, resolved):
    peaks, probe = Peaks(), Probe()
    environment = Environment(rank, rank, world_size, world_size, "torchrun")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), {"peaks": peaks, "probe": probe}) as run:
        state = run.state
        held = {part: part.tensor for parts in (state.world.parts, state.world.stored) for part in parts}
        whole = assemble(state.world, held)
        sizes = {name: tensor.numel() for name, tensor in whole.items()}
        persistent = sum(p.numel() for p in state.model.parameters())
        return max(peaks.live), max(sizes.values()), sum(sizes.values()), persistent, state.world.readable


def test_stage_3_never_has_the_whole_model_on_a_rank(make_recipe):
    resolved = make_recipe(plugins(3, persistence_threshold=0), 2)
    for peak, largest, everything, kept, readable in run_ranks(2, materialized, resolved):
        assert peak == largest < everything, "one parameter at a time is whole"
        assert kept == 0 and not readable, "between forwards nothing is"


def lived(rank, world_size, stages, make):
    """Several sessions in this process, and what each of them leaves."""
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils import groups

    def traces():
        return (
            comm.cdb,
            groups._WORLD_GROUP,
            len(parameter_offload.FWD_MODULE_STACK),
            torch.nn.functional.linear,
            os.environ.get("LOCAL_RANK"),
            dist.is_initialized(),
            list(warnings.filters),
        )

    before, seen = traces(), []
    environment = Environment(rank, rank, world_size, world_size, "none")
    for stage in stages:
        probe, resolved = Probe(), make[stage]
        with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), {"probe": probe}) as trainer:
            trainer.train(Quiet(), Quiet())
        model = trainer.state.model
        assert traces() == before, stage
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and type(module._parameters) is dict
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        seen.append(probe.records)
    return seen


def test_several_sessions_in_one_process_leave_nothing(make_recipe, capfd):
    stages = (3, 1, 0, 2, 3)
    recipes = {stage: copy.deepcopy(make_recipe(plugins(stage), 1, **SHORT)) for stage in set(stages)}
    (runs,) = run_ranks(1, lived, stages, recipes)
    assert_bit_equal(runs[0], runs[-1])
    wanted = reference(make_recipe(plugins(), **SHORT))
    for records in runs:
        assert_within(compare(records, wanted), FP32)
    shown = capfd.readouterr()
    assert shown.out == "", "DeepSpeed prints"
    assert "DeepSpeed" not in shown.err and "collect2" not in shown.err


def test_deepspeed_tells_warnings_only(make_recipe):
    (level,) = run_ranks(1, quiet, make_recipe(plugins(1), 1, **SHORT))
    assert level == logging.WARNING


def quiet(rank, world_size, resolved):
    environment = Environment(rank, rank, world_size, world_size, "none")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir)):
        return logging.getLogger("DeepSpeed").level


class Poison(Plugin):
    """Makes one rank's gradient NaN."""

    @hookimpl
    def around_forward(self, state, call):
        return lambda batch: call(batch) * (float("nan") if state.step == 2 and state.world.rank == 0 else 1.0)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_not_finite_ends_the_run(make_recipe, stage):
    with pytest.raises(RankFailed, match="is nan at step 3"):
        record_ranks(make_recipe(plugins(stage), 2, **SHORT), 2, {"poison": Poison()})
