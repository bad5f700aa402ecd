"""Rectangles of parameters, stages of a pipeline and data ranks, combined: each grid reads what another wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_flat import everything_whole, flat_optimizer
from checkpoint_grid import SHARED, STAGES, Grid, GridRun
from checkpoint_toy import Plain, Run, Toy, differences, everything, folder
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import camshaft_checkpoint
from camshaft.errors import CheckpointError
from camshaft.mesh import Mesh, MeshShape
from camshaft.parts import Box, Parts
from camshaft.recipe.schema import Parallel
from camshaft.testing.ranks import run_ranks
from camshaft_checkpoint import storage

GRIDS = {
    "plain": Grid(1),
    "flat3": Grid(3, shards=3),
    "tp2": Grid(2, tp=2),
    "tp2-masters": Grid(2, tp=2, masters=True),
    "tp4": Grid(4, tp=4),
    "pp2": Grid(2, pp=2),
    "tp2-pp2": Grid(4, tp=2, pp=2),
    "tp2-flat2": Grid(4, tp=2, shards=2),
    "pp2-flat2": Grid(4, pp=2, shards=2),
    "tp2-dp2": Grid(4, tp=2),
}
WIDE = {"tp2-pp2-flat2": Grid(8, tp=2, pp=2, shards=2), "tp4-flat2": Grid(8, tp=4, shards=2)}
NAMES = list(GRIDS)
PAIRS = [(name, NAMES[(place + far) % len(NAMES)]) for far in (1, 3) for place, name in enumerate(NAMES)]


def _saved(rank: int, world_size: int, path: Path, grid: Grid, kind: str, options: dict[str, Any]) -> Any:
    run = GridRun(path, rank, grid, kind=kind, **{"every_steps": 3, **options})
    run.late = 2
    run.train(3)
    run.plugin.close(run.state, "finished")
    return everything_whole(run)


def _loaded(rank: int, world_size: int, path: Path, grid: Grid, kind: str) -> Any:
    run = GridRun(path, rank, grid, seed=9, kind=kind)
    run.late = 2
    assert run.load()
    loaded = everything_whole(run)
    for _ in range(2):
        run.step()
    return loaded, everything_whole(run)


def save(path: Path, grid: Grid, kind: str = "adamw", **options: Any) -> dict[str, Any]:
    first: dict[str, Any] = run_ranks(grid.ranks, _saved, path, grid, kind, options)[0]
    return first


def check_pair(path: Path, before: Grid, after: Grid, kind: str = "adamw") -> None:
    """All bits come back in ``after``, and two more steps there are those of one plain process."""
    straight = Run(path / "straight", kind=kind)
    straight.late = 2
    for _ in range(5):
        straight.step()
    saved = save(path / "run", before, kind)
    loaded, later = run_ranks(after.ranks, _loaded, path / "run", after, kind)[0]
    assert differences(saved, loaded) == []
    assert differences(everything_whole(straight), later) == []
    assert camshaft_checkpoint.verify(folder(path / "run", 3)) == []


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_each_grid_reads_every_bit_of_another(tmp_path: Path, before: str, after: str) -> None:
    check_pair(tmp_path, GRIDS[before], GRIDS[after])


@pytest.mark.parametrize(("before", "after"), [("tp2-pp2-flat2", "tp4-flat2"), ("tp4-flat2", "tp2-pp2-flat2")])
def test_three_axes_at_once(tmp_path: Path, before: str, after: str) -> None:
    check_pair(tmp_path, WIDE[before], WIDE[after])


@pytest.mark.parametrize("kind", ["nadam", "counting"])
def test_single_numbers_of_every_kind_cross_grids(tmp_path: Path, kind: str) -> None:
    check_pair(tmp_path / "one", GRIDS["tp2-pp2"], GRIDS["pp2-flat2"], kind)
    check_pair(tmp_path / "two", GRIDS["pp2-flat2"], GRIDS["tp2"], kind)


def _background(rank: int, world_size: int, path: Path, grid: Grid) -> tuple[Any, Any]:
    run = GridRun(path, rank, grid, async_save=True)
    run.step()
    run.step()
    saved = everything_whole(run)
    run.plugin.post_step(run.state)
    run.step()  # while it is being written
    run.plugin.close(run.state, "finished")
    later = everything_whole(run)
    return saved, later


@pytest.mark.parametrize("name", ["tp2", "tp2-flat2", "pp2"])
def test_later_steps_cannot_touch_what_is_written_in_the_background(tmp_path: Path, name: str) -> None:
    saved, later = run_ranks(GRIDS[name].ranks, _background, tmp_path, GRIDS[name])[0]
    assert differences(saved, later)
    loaded = Run(tmp_path, model=Toy(seed=9))
    assert loaded.load()
    assert differences(saved, everything_whole(loaded)) == []


def test_the_toy_has_what_makes_grids_hard(tmp_path: Path) -> None:
    def shapes(rank: int, grid: Grid) -> dict[str, tuple[Box, tuple[int, ...]]]:
        run = GridRun(tmp_path / "none", rank, grid)
        named = run.state.named_parameters()
        return {name: (box, tuple(named[name].shape)) for name, box in run.state.world.boxes.items()}

    four = [shapes(rank, Grid(4, tp=4)) for rank in range(4)]
    assert [each["embed.weight"][1][0] for each in four] == [0, 2, 4, 7]
    assert [(each[SHARED][0].offset[0], each[SHARED][0].copies) for each in four] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    cuts = []
    for rank in range(2):  # the first data rank of each place on tp
        parts = GridRun(tmp_path / "none", rank, GRIDS["tp2-flat2"]).state.world.parts
        cuts.append({piece.name: piece.length for part in parts for piece in part.pieces if piece.copies > 1})
    assert cuts[0].get("up.weight", 0) != cuts[1].get("up.weight", 0)


@pytest.mark.parametrize("name", ["tp2", "tp4", "pp2", "tp2-pp2", "tp2-flat2", "tp2-dp2"])
def test_the_index_is_that_of_one_process_and_copies_are_written_once(tmp_path: Path, name: str) -> None:
    tables = []
    for grid in ("plain", name):
        save(tmp_path / grid, GRIDS[grid])
        found = camshaft_checkpoint.inspect(folder(tmp_path / grid, 3))
        tables.append({key: (each["dtype"], each["shape"], each["bytes"]) for key, each in found["tensors"].items()})
    flat = GRIDS[name].shards  # which leave parameters without elements out
    assert {
        key: each for key, each in tables[0].items() if not flat or "empty" not in key or "model." in key
    } == tables[1]
    checkpoint = folder(tmp_path / name, 3)
    index = json.loads((checkpoint / "index.json").read_bytes())
    assert {group for each in index["document"]["optimizer"]["groups"] for group in each["parameters"]} >= {
        "embed.weight", "up.bias", "wide", "scale", "unused",
    }  # fmt: skip
    wanted = sum(size for _, _, size in tables[1].values())
    written = sum(entry.end - entry.begin for entry in _entries(checkpoint))
    assert written == wanted  # no element twice


def _entries(checkpoint: Path) -> list[Any]:
    from camshaft_checkpoint.tensorfile import read_header

    return [each for file in checkpoint.glob("*.safetensors") for each in read_header(file).values()]


def test_copies_are_shared_out_among_the_ranks_that_have_them(tmp_path: Path) -> None:
    save(tmp_path, WIDE["tp4-flat2"])
    index = json.loads((folder(tmp_path, 3) / "index.json").read_bytes())["tensors"]
    writers = {name: {piece["file"] for piece in entry["pieces"]} for name, entry in index.items()}
    assert all(len(files) <= 4 for name, files in writers.items() if SHARED in name), writers
    copied = [files for name, files in writers.items() if name.startswith(("model.up", "optimizer.up.weight.exp"))]
    assert len(set.union(*copied)) > 2


def _reading(rank: int, world_size: int, path: Path, grid: Grid) -> Any:
    read: dict[str, int] = {}
    original = storage.Reader._read

    def counting(self: Any, opened: Any, item: Any, planner: Any) -> None:
        read[item.dest_index.fqn] = read.get(item.dest_index.fqn, 0) + torch.Size(item.lengths).numel()
        original(self, opened, item, planner)

    run = GridRun(path, rank, grid)
    storage.Reader._read = counting  # type: ignore[method-assign]
    assert run.load()
    held: dict[str, int] = {}
    for part in [*run.state.world.parts, *run.state.world.stored]:
        for piece in part.pieces:
            held[piece.name] = held.get(piece.name, 0) + piece.length
    return read, held, run.held


@pytest.mark.parametrize("name", ["pp2-flat2", "tp2-flat2", "tp2-pp2"])
def test_a_rank_reads_its_own_elements_and_names_alone(tmp_path: Path, name: str) -> None:
    save(tmp_path, GRIDS["flat3"])
    for read, held, names in run_ranks(GRIDS[name].ranks, _reading, tmp_path, GRIDS[name]):
        foreign = {key for key in read if not any(f".{own}" in key for own in {*names, "seen", "mask"})}
        assert foreign == set()
        for own, length in held.items():
            assert read.get(f"model.{own}", length) == length
            assert read.get(f"optimizer.{own}.exp_avg", length) == length
        assert any(read.get(f"optimizer.{own}.exp_avg") for own in held)


class _Order:
    """Own state of a plugin, as that of one which lists the parameters of its rank."""

    def __init__(self, run: GridRun, *, torn: bool = False) -> None:
        self.loaded: Any = None
        names = sorted(run.held) + ([f"rank{run.state.world.rank}"] if torn else [])
        run.state.components = [
            ("order", lambda: {"names": names}, self._take),
            ("same", lambda: {"n": 1}, lambda _: None),
        ]

    def _take(self, entries: Any) -> None:
        self.loaded = entries["names"]


def _components(rank: int, world_size: int, path: Path, grid: Grid, torn: bool) -> Any:
    run = GridRun(path, rank, grid)
    order = _Order(run, torn=torn)
    if not run.load():
        try:
            run.train(1)
        except CheckpointError as error:
            return str(error)
    return order.loaded, sorted(run.held)


def test_state_of_plugins_that_differs_from_stage_to_stage(tmp_path: Path) -> None:
    grid = Grid(4, pp=2)
    run_ranks(4, _components, tmp_path, grid, False)
    for loaded, own in run_ranks(4, _components, tmp_path, grid, False):
        assert loaded == own
    document = json.loads((folder(tmp_path, 1) / "index.json").read_bytes())["document"]
    assert set(document["components_by_pp"]) == {"order"}  # what is equal is kept once
    ((loaded, _),) = run_ranks(1, _components, tmp_path, GRIDS["plain"], False)
    assert loaded == sorted(STAGES)  # the first stage's
    assert "embed.weight" in loaded


def test_state_of_plugins_that_differs_within_a_stage_is_refused(tmp_path: Path) -> None:
    for told in run_ranks(4, _components, tmp_path, Grid(4, pp=2), True):
        assert "state_dict of plugin 'order' is not the same on ranks 0 and 1" in told
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _faulty(rank: int, world_size: int, path: Path, grid: Grid, how: str) -> str:
    run = GridRun(path, rank, grid)
    world = run.state.world
    if how == "stage":
        world.stages = dict.fromkeys(world.stages, 2 * world.mesh.place["pp"])
    elif rank == world_size - 1:
        name = "embed.weight"
        box = world.boxes[name]
        shape, offset = (26, 7), box.offset
        if how == "hole":
            shape, offset = box.shape, (0, 0)
        world.boxes[name] = Box(shape, offset, box.copies)
        world.parts.attach(world.boxes)
    run.count()
    try:
        run.plugin.post_step(run.state)
    except CheckpointError as error:
        return str(error)
    return "saved"


WHOLE = "'model.embed.weight' is torch.float32"


@pytest.mark.parametrize(
    ("how", "grid", "told"),
    [
        ("hole", GRIDS["tp2"], f"{WHOLE} [2, 7] of [13, 7] on one rank and torch.float32 [11, 7] of"),
        ("shape", GRIDS["tp2"], f"{WHOLE} [13, 7] on rank 0 and torch.float32 [26, 7] on rank 1"),
        ("stage", GRIDS["pp2"], "no rank holds a parameter of pipeline stage 1, and there are 3 stages"),
    ],
)
def test_grids_that_do_not_make_up_a_model_are_refused(tmp_path: Path, how: str, grid: Grid, told: str) -> None:
    for text in run_ranks(grid.ranks, _faulty, tmp_path, grid, how):
        assert told in text
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _refused(rank: int, world_size: int, path: Path, grid: Grid) -> str:
    return _refusal(GridRun(path, rank, grid).load)


def test_the_file_of_a_missing_stage_is_named_with_what_it_holds(tmp_path: Path) -> None:
    save(tmp_path, GRIDS["pp2"])
    index = json.loads((folder(tmp_path, 3) / "index.json").read_bytes())["tensors"]
    (lost,) = {piece["file"] for piece in index["model.wide"]["pieces"]}
    (folder(tmp_path, 3) / lost).unlink()
    for text in run_ranks(4, _refused, tmp_path, GRIDS["tp2-pp2"]):
        assert f"{lost}: missing (it holds model.empty, model.frozen.weight and " in text


def _without(rank: int, world_size: int, path: Path) -> None:
    run = GridRun(path, rank, GRIDS["pp2"])
    if rank == 1:
        run.model.wide = None
        run.state.world.parts = Parts(part for part in run.state.world.parts if part.pieces[0].name != "wide")
        run.state.optimizer = flat_optimizer(run.state.world.parts, "adamw")
    run.count()
    run.plugin.post_step(run.state)


def test_names_that_no_rank_had_are_missed_by_every_rank(tmp_path: Path) -> None:
    run_ranks(2, _without, tmp_path)
    for text in run_ranks(2, _refused, tmp_path, GRIDS["tp2"]):
        assert "model.wide: not in the checkpoint" in text


def _sharded(rank: int, world_size: int, path: Path) -> None:
    """``fully_shard`` over two data ranks of what each of two ranks along ``tp`` has: DTensors of rectangles."""
    model = Plain()
    place = rank % 2
    cut = slice(0, 5) if place == 0 else slice(5, 15)
    model.first.weight = nn.Parameter(model.first.weight.detach()[cut].clone())
    boxes = {name: Box(tuple(value.shape), (0,) * value.ndim, 2) for name, value in model.named_parameters()}
    boxes["first.weight"] = Box((15, 7), (cut.start, 0))
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["dp"])
    run = Run(path, rank, world_size, model=model)
    world = run.state.world
    world.boxes = boxes
    world.mesh = Mesh(MeshShape.of(Parallel(tensor_parallel=2), 4), rank, None)
    world.parts.attach(boxes)
    run.load()
    _constant_step(run)
    run.plugin.post_step(run.state)


def _constant_step(run: Run) -> None:
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    run.state.optimizer.step()
    run.count()


def test_dtensors_of_rectangles(tmp_path: Path) -> None:
    straight = Run(tmp_path / "straight", model=Plain())
    for step in (1, 2):
        run_ranks(4, _sharded, tmp_path / "run")
        _constant_step(straight)
        loaded = Run(tmp_path / "run", model=Plain())
        assert loaded.load()
        assert loaded.state.step == step
        assert differences(everything(straight.state), everything(loaded.state)) == []


def _rows(rank: int, world_size: int, path: Path, kept: bool) -> str:
    """State of one number a row, of a parameter whose rows are divided."""
    run = GridRun(path, rank, GRIDS["tp2"])
    if not kept:
        return _refusal(run.load)
    run.step()
    for part in run.state.world.parts:
        if part.pieces[0].name == "embed.weight":
            run.state.optimizer.state[part.tensor]["rows"] = torch.zeros(part.tensor.shape[0])
    return _refusal(lambda: run.plugin.post_step(run.state))


def _refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        work()
    return str(caught.value)


def test_state_that_is_not_an_element_each_cannot_be_divided(tmp_path: Path) -> None:
    for text in run_ranks(2, _rows, tmp_path, True):
        assert "optimizer state 'rows' of 'embed.weight' has shape [2], which is neither one value nor one an" in text
    whole = Run(tmp_path)
    whole.step()
    whole.state.optimizer.state[whole.model.embed.weight]["rows"] = torch.zeros(13)
    whole.plugin.post_step(whole.state)
    for text in run_ranks(2, _rows, tmp_path, False):
        assert "optimizer.embed.weight.rows: is not shaped like its parameter, which is divided over ranks" in text
