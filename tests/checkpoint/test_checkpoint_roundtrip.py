"""What is loaded equals what was saved, bit for bit, and training goes on as if it had never stopped."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toy import Plain, Run, Toy, differences, everything, files_of, folder, steps
from safetensors.torch import load_file
from torch import nn

import camshaft_checkpoint
from camshaft.errors import CheckpointError
from camshaft.parts import Part, Piece
from camshaft.testing.ranks import run_ranks
from camshaft_checkpoint import contents, moments
from camshaft_checkpoint.index import Stored


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd"])
def test_loading_gives_back_every_bit(tmp_path: Path, kind: str) -> None:
    first = Run(tmp_path, kind=kind)
    first.train(3)
    saved = everything(first.state)

    second = Run(tmp_path, kind=kind, model=Toy(seed=9))
    assert differences(saved, everything(second.state))  # it starts elsewhere
    assert second.load() is True
    assert differences(saved, everything(second.state)) == []
    assert second.state.step == 3
    assert second.state.consumed_samples == 12
    assert second.model.head.weight is second.model.embed.weight


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd"])
def test_continuing_equals_never_stopping(tmp_path: Path, kind: str) -> None:
    straight = Run(tmp_path / "a", kind=kind)
    straight.train(8)
    stopped = Run(tmp_path / "b", kind=kind)
    stopped.train(4)
    resumed = Run(tmp_path / "b", kind=kind, model=Toy(seed=9))
    assert resumed.load()
    resumed.train(4)
    assert differences(everything(straight.state), everything(resumed.state)) == []


def test_the_adam_step_is_where_the_optimizer_wants_it(tmp_path: Path) -> None:
    Run(tmp_path, kind="adamw").train(2)
    for kind in ("adamw", "fused"):  # each loads what the other wrote
        run = Run(tmp_path, kind=kind)
        assert run.load()
        state = run.state.optimizer.state[run.model.up.weight]
        assert state["step"].dtype == torch.float32
        assert state["step"].shape == ()
        assert state["step"].item() == 2.0


@pytest.mark.parametrize(
    ("key", "shape", "group", "device"),
    [
        ("step", (), {"fused": True}, "meta"),
        ("step", (), {"capturable": True}, "meta"),
        ("step", (), {"fused": None, "capturable": False}, "cpu"),
        ("exp_avg", (3, 5), {}, "meta"),
        ("row", (3,), {}, "meta"),
    ],
)
def test_new_optimizer_state_is_made_on_the_right_device(
    key: str, shape: tuple[int, ...], group: dict[str, Any], device: str
) -> None:
    parameter = nn.Parameter(torch.empty(3, 5, dtype=torch.bfloat16, device="meta"))
    part = Part(parameter, "matrix", (Piece("weight", (3, 5), 0, 0, 15),))
    made = moments.empty_state(Stored("F32", shape, ()), key, part, group)
    assert made is not None
    assert (made.device.type, made.dtype, tuple(made.shape)) == (device, torch.float32, shape)
    assert not made.requires_grad


def test_order_and_groups_of_parameters_do_not_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Run(tmp_path)
    first.train(3)
    second = Run(tmp_path, kind="reordered", model=Toy(seed=9))
    assert second.load()
    assert differences(everything(first.state), everything(second.state)) == []
    assert len(second.state.optimizer.param_groups) == 1
    assert "weight_decay was 0.0 and is 0.1 for 2 parameter(s)" in caplog.text


def test_learning_rate_comes_from_the_recipe(tmp_path: Path) -> None:
    Run(tmp_path).train(1)
    second = Run(tmp_path)
    for group in second.state.optimizer.param_groups:
        group["lr"] = 0.123
    assert second.load()
    assert {group["lr"] for group in second.state.optimizer.param_groups} == {0.123}


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    Run(tmp_path).train(1)
    names = set(camshaft_checkpoint.inspect(folder(tmp_path, 1))["tensors"])
    model = {name for name in names if name.startswith("model.")}
    assert model == {
        "model.embed.weight", "model.up.weight", "model.up.bias", "model.frozen.weight", "model.low", "model.wide",
        "model.scale", "model.empty", "model.unused", "model.seen", "model.mask",
    }  # fmt: skip
    trained = {"embed.weight", "up.weight", "up.bias", "low", "wide", "scale", "empty"}
    assert names - model == {f"optimizer.{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    written = sorted(entry.name for entry in files_of(folder(tmp_path, 1)))
    assert written == ["index.json", "manifest.json", "rank_00000.safetensors"]
    assert all(entry.stat().st_mode & 0o777 == 0o600 for entry in files_of(folder(tmp_path, 1)))


def test_others_can_read_the_files(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(1)
    stored = load_file(folder(tmp_path, 1) / "rank_00000.safetensors")
    assert torch.equal(stored["model.low@0,0"], run.model.low)
    assert torch.equal(stored["model.wide@0,0,0"], run.model.wide)
    assert torch.equal(stored["model.mask@0"], run.model.mask)
    assert stored["model.scale@"].item() == run.model.scale.item()
    assert stored["model.empty@0,0"].shape == (0, 4)


def test_state_of_plugins_returns_to_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine: dict[str, Any] = {"scale": 65536.0, "history": [1, 2.5, "x"], "best": float("inf")}
    got: list[Any] = []
    first = Run(tmp_path)
    first.state.components = [("scaler", lambda: mine, got.append), ("gone", lambda: {"a": 1}, got.append)]
    first.train(1)
    mine["history"].append("later")
    second = Run(tmp_path)
    second.state.components = [("fresh", dict, got.append), ("scaler", dict, got.append)]
    assert second.load()
    assert got == [{"scale": 65536.0, "history": [1, 2.5, "x"], "best": float("inf")}]
    assert "state of plugin 'gone', which is not enabled" in caplog.text


def test_state_that_is_not_json_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.state.components = [("odd", lambda: {"a": object()}, dict)]
    with pytest.raises(CheckpointError, match="not JSON"):
        run.train(1)
    assert steps(tmp_path) == []


def test_extra_state_of_a_module_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"any": "object"}

    with pytest.raises(CheckpointError, match=r"_extra_state.*only tensors"):
        Run(tmp_path, model=Odd(2, 2)).train(1)


def test_data_that_changed_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(tmp_path).train(1)
    same = Run(tmp_path)
    assert same.load()
    assert "DATA CHANGED" not in caplog.text
    other = Run(tmp_path)
    other.state.data_fingerprint = "data two"
    assert other.load()
    assert "DATA CHANGED" in caplog.text


class Wider(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 16)
        self.extra = nn.Parameter(torch.zeros(2))
        del self.low
        self.register_buffer("seen", self.seen.int())


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    Run(tmp_path).train(1)
    other = Run(tmp_path, model=Wider())
    before = everything(other.state)
    with pytest.raises(CheckpointError) as caught:
        other.load()
    text = str(caught.value)
    assert "model.up.weight: shape [15, 7] in the checkpoint, [16, 7] now" in text
    assert "model.extra: not in the checkpoint" in text
    assert "model.low: in the checkpoint, and has no place now" in text
    assert "optimizer.low.exp_avg: in the checkpoint, and has no place now" in text
    assert "model.seen: torch.int64 in the checkpoint, torch.int32 now" in text
    assert "nothing was loaded" in text
    assert differences(before, everything(other.state)) == []


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    Run(tmp_path).train(1)
    other = Run(tmp_path, kind="sgd")
    before = everything(other.state)
    with pytest.raises(CheckpointError, match="the optimizer was AdamW and is SGD"):
        other.load()
    assert differences(before, everything(other.state)) == []


def test_a_parameter_that_was_trained_and_is_frozen_now_is_refused(tmp_path: Path) -> None:
    Run(tmp_path).train(1)
    model = Toy()
    model.up.weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"optimizer\.up\.weight\.exp_avg: in the checkpoint"):
        Run(tmp_path, model=model).load()


def test_non_finite_numbers_are_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    run.train(1)
    for loss, norm in ((float("nan"), 1.0), (1.0, float("inf"))):
        run.step()
        run.state.loss, run.state.grad_norm = torch.tensor(loss), torch.tensor(norm)
        run.plugin.post_step(run.state)
    run.plugin.save(run.state)
    assert steps(tmp_path) == [1]
    assert "not finite" in caplog.text


def test_save_writes_once_and_close_waits(tmp_path: Path) -> None:
    run = Run(tmp_path, every_steps=None, total_steps=2)
    run.train(2)
    assert steps(tmp_path) == []
    run.plugin.save(run.state)
    assert steps(tmp_path) == [2]
    before = (folder(tmp_path, 2) / "manifest.json").stat().st_mtime_ns
    run.plugin.save(run.state)
    assert (folder(tmp_path, 2) / "manifest.json").stat().st_mtime_ns == before
    run.plugin.close(run.state, "finished")


def test_save_at_end_can_be_off_and_a_stop_is_saved_all_the_same(tmp_path: Path) -> None:
    run = Run(tmp_path, every_steps=10, save_at_end=False, total_steps=3)
    run.train(2)
    run.plugin.save(run.state)  # asked to stop
    assert steps(tmp_path) == [2]
    run.train(1)
    run.plugin.save(run.state)  # the end
    assert steps(tmp_path) == [2]


def test_resume_never_and_from_a_path(tmp_path: Path) -> None:
    old = Run(tmp_path / "old")
    old.train(3)
    with pytest.raises(CheckpointError, match="resume is 'never'"):
        Run(tmp_path / "old", resume="never").load()
    assert Run(tmp_path / "none", resume="never").load() is False
    whole, inside = tmp_path / "old", tmp_path / "old" / "checkpoints"
    for number, (path, step) in enumerate(((folder(whole, 2), 2), (inside, 3), (whole, 3))):
        run = Run(tmp_path / f"new{number}", resume=str(path), model=Toy(seed=9))
        assert run.load()
        assert run.state.step == step
        run.train(1)
        again = Run(tmp_path / f"new{number}", resume=str(path))  # killed, and the same command again
        assert again.load()
        assert again.state.step == step + 1
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        Run(tmp_path / "new", resume=str(tmp_path / "nowhere")).load()


def test_nothing_to_continue(tmp_path: Path) -> None:
    run = Run(tmp_path)
    before = everything(run.state)
    assert run.load() is False
    assert differences(before, everything(run.state)) == []


def _saved_by(rank: int, world_size: int, path: Path, options: dict[str, Any]) -> Any:
    run = Run(path, rank, world_size, **options)
    run.train(3)
    run.plugin.close(run.state, "finished")
    return everything(run.state)


def _continued_by(rank: int, world_size: int, path: Path, more: int) -> Any:
    run = Run(path, rank, world_size, model=Toy(seed=9))
    assert run.load()
    loaded = everything(run.state)
    run.train(more)
    return loaded, everything(run.state)


@pytest.mark.parametrize("options", [{}, {"async": True}], ids=["sync", "async"])
def test_replicated_tensors_on_other_numbers_of_ranks(tmp_path: Path, options: dict[str, Any]) -> None:
    saved = run_ranks(2, _saved_by, tmp_path, options)[0]
    files = {entry.name: entry.stat().st_size for entry in files_of(folder(tmp_path, 3))}
    sizes = sorted(size for name, size in files.items() if name.startswith("rank"))
    assert len(sizes) == 2
    assert sizes[1] < 2.5 * sizes[0]  # the work is divided
    reference = Run(tmp_path / "reference")
    reference.train(5)
    for world_size in (1, 2, 3):
        for loaded, later in run_ranks(world_size, _continued_by, tmp_path, 0):
            assert differences(saved, loaded) == []
            assert differences(saved, later) == []
    for _, later in run_ranks(2, _continued_by, tmp_path, 2):
        assert differences(everything(reference.state), later) == []


def _sharded(rank: int, world_size: int, path: Path, kind: str, more: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Plain()
    if world_size > 1:
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    run = Run(path, rank, world_size, model=model, kind=kind)
    run.load()
    loaded = everything(run.state)
    run.train(more)
    return loaded, everything(run.state)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_sharded_tensors_from_2_to_1_to_2_ranks(tmp_path: Path, kind: str) -> None:
    straight = run_ranks(1, _sharded, tmp_path / "straight", kind, 6)[0][1]
    _, second = run_ranks(2, _sharded, tmp_path / "run", kind, 2)[0]
    name = {"adamw": "exp_avg", "sgd": "momentum_buffer"}[kind]
    pieces = camshaft_checkpoint.inspect(folder(tmp_path / "run", 2))["tensors"]
    assert pieces[f"optimizer.first.weight.{name}"]["pieces"] == 2
    loaded, fourth = run_ranks(1, _sharded, tmp_path / "run", kind, 2)[0]
    assert differences(second, loaded) == []
    for loaded, sixth in run_ranks(2, _sharded, tmp_path / "run", kind, 2):
        assert differences(fourth, loaded) == []
        assert differences(straight, sixth) == []
    three, _ = run_ranks(3, _sharded, tmp_path / "run", kind, 0)[2]
    assert differences(straight, three) == []


def _disagreeing(rank: int, world_size: int, path: Path) -> str:
    model = nn.Linear(2 + rank, 2)
    try:
        Run(path, rank, world_size, model=model).train(1)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_divided_tensor_that_is_no_dtensor_is_refused(tmp_path: Path) -> None:
    for text in run_ranks(2, _disagreeing, tmp_path):
        assert "'model.weight' is torch.float32 [2, 2]" in text
        assert "must be a DTensor" in text
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_digest_of_the_recipe_covers_plugins(tmp_path: Path) -> None:
    digests = set()
    for keep in (2, 2, 3):
        run = Run(tmp_path)
        run.state.world.recipe.plugins["checkpoint"] = run.plugin.Options(every_steps=1, keep_last=keep)
        digests.add(contents.origin(run.state)["recipe_sha256"])
    assert len(digests) == 2


def test_index_says_where_it_comes_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Run(tmp_path).train(1)
    document = json.loads((folder(tmp_path, 1) / "index.json").read_bytes())["document"]
    assert document["state"] == {"step": 1, "consumed_samples": 4, "consumed_tokens": 512}
    assert document["origin"]["data_fingerprint"] == "data one"
    assert len(document["origin"]["recipe_sha256"]) == 64
    assert document["origin"]["torch"] == str(torch.__version__)
    assert document["optimizer"]["class"] == "AdamW"
    assert "checkpoint" in caplog.text
