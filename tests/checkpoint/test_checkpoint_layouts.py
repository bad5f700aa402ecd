"""What one layout wrote, every other reads: whole, replicated, in flat buffers cut anywhere, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_flat import FlatRun, everything_whole
from checkpoint_toy import Gate, Plain, Run, Toy, differences, files_of, folder
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import camshaft_checkpoint
from camshaft.errors import CheckpointError
from camshaft.parts import Piece
from camshaft.testing.ranks import run_ranks
from camshaft_checkpoint import storage

LAYOUTS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "plain": (1, None),
    "replicated-2": (2, None),
    "flat-1": (1, {}),
    "flat-2": (2, {}),
    "flat-3": (3, {}),
    "hybrid-2x2": (4, {"shards": 2}),
}
PAIRS = [
    ("flat-2", "flat-3"),
    ("flat-3", "plain"),
    ("flat-2", "replicated-2"),
    ("plain", "flat-2"),
    ("replicated-2", "flat-3"),
    ("hybrid-2x2", "flat-3"),
    ("flat-3", "hybrid-2x2"),
    ("flat-1", "flat-2"),
]


def make(path: Path, rank: int, world_size: int, flat: dict[str, Any] | None, **options: Any) -> Run:
    run = Run(path, rank, world_size, **options) if flat is None else FlatRun(path, rank, world_size, **flat, **options)
    run.late = 2
    return run


def _saved(rank: int, world_size: int, path: Path, flat: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    run = make(path, rank, world_size, flat, **options)
    run.train(3)
    run.plugin.close(run.state, "finished")
    return everything_whole(run)


def _loaded(rank: int, world_size: int, path: Path, flat: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    run = make(path, rank, world_size, flat, model=Toy(seed=9), **options)
    assert run.load()
    loaded = everything_whole(run)
    for _ in range(3):
        run.step()
    return loaded, everything_whole(run)


def save(path: Path, layout: str, **options: Any) -> list[Any]:
    world_size, flat = LAYOUTS[layout]
    return run_ranks(world_size, _saved, path, flat, options)


def load(path: Path, layout: str, **options: Any) -> list[Any]:
    world_size, flat = LAYOUTS[layout]
    return run_ranks(world_size, _loaded, path, flat, options)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=["->".join(pair) for pair in PAIRS])
def test_each_layout_reads_every_bit_of_any_other(tmp_path: Path, before: str, after: str, kind: str) -> None:
    straight = make(tmp_path / "straight", 0, 1, None, kind=kind)
    for _ in range(6):
        straight.step()
    saved = save(tmp_path / "run", before, kind=kind)
    for loaded, later in load(tmp_path / "run", after, kind=kind):
        assert differences(saved[0], loaded) == []
        assert differences(everything_whole(straight), later) == []
    if kind == "adamw":
        assert (saved[0]["up.bias/step"], saved[0]["up.weight/step"]) == (1, 3)
    assert not any(name.startswith(("unused/", "frozen.weight/")) for name in saved[0])


def apart(one: dict[str, Any], other: dict[str, Any], bound: float) -> list[str]:
    """Names at which tensors differ by more than ``bound`` of their largest element, or anything else at all."""
    return [
        name
        for name in differences(one, other)
        if not isinstance(one.get(name), torch.Tensor)
        or one[name].dtype != other[name].dtype
        or float((one[name] - other[name]).abs().max()) > bound * float(one[name].abs().max())
    ]


@pytest.mark.parametrize("kind", ["adagrad", "nadam", "counting", "fused"])
def test_state_of_every_kind_finds_its_place(tmp_path: Path, kind: str) -> None:
    straight = make(tmp_path / "straight", 0, 1, None, kind=kind)
    for _ in range(6):
        straight.step()
    for before, after in (("flat-2", "plain"), ("plain", "flat-3")):
        saved = save(tmp_path / before, before, kind=kind)
        for loaded, later in load(tmp_path / before, after, kind=kind):
            assert differences(saved[0], loaded) == []
            # The fused kernel rounds an element otherwise where a buffer ends in the middle of a vector.
            assert apart(everything_whole(straight), later, bound=2.5e-7 if kind == "fused" else 0.0) == []


def _parts(rank: int, world_size: int, path: Path) -> Any:
    run = make(path, rank, world_size, {})
    before = [[piece.name for piece in part.pieces] for part in run.state.world.parts]
    assert run.load()
    return before, [[piece.name for piece in part.pieces] for part in run.state.world.parts]


def test_only_parameters_with_other_state_leave_their_buffer(tmp_path: Path) -> None:
    save(tmp_path, "plain")
    for before, after in run_ranks(2, _parts, tmp_path):
        assert [name for names in before for name in names] == [name for names in after for name in names]
        for names in after:
            assert len(names) == 1 or not {"up.bias", "unused"} & set(names), names
    save(tmp_path / "flat", "flat-2")
    run = FlatRun(tmp_path / "flat")
    largest = max(len(part.pieces) for part in run.state.world.parts)
    assert run.load()
    assert max(len(part.pieces) for part in run.state.world.parts) == largest - 1  # without the unused


def test_groups_are_described_as_one_process_would(tmp_path: Path) -> None:
    groups = []
    for layout in ("plain", "flat-3"):
        save(tmp_path / layout, layout)
        document = json.loads((folder(tmp_path / layout, 3) / "index.json").read_bytes())["document"]
        found = [(group["options"], set(group["parameters"]) - {"empty"}) for group in document["optimizer"]["groups"]]
        groups.append(found)
    assert groups[0] == groups[1]


def _reading(rank: int, world_size: int, path: Path) -> Any:
    read: dict[str, int] = {}
    largest = 0
    original = storage.Reader._read

    def counting(self: Any, opened: Any, item: Any, planner: Any) -> None:
        nonlocal largest
        elements = torch.Size(item.lengths).numel()
        read[item.dest_index.fqn] = read.get(item.dest_index.fqn, 0) + elements
        largest = max(largest, elements)
        original(self, opened, item, planner)

    run = make(path, rank, world_size, {})
    storage.Reader._read = counting  # type: ignore[method-assign]
    assert run.load()
    held: dict[str, int] = {}
    for part in [*run.state.world.parts, *run.state.world.stored]:
        for piece in part.pieces:
            held[piece.name] = held.get(piece.name, 0) + piece.length
    return read, held, largest


def test_a_rank_reads_what_it_holds_and_no_more(tmp_path: Path) -> None:
    save(tmp_path, "plain")
    total: dict[str, int] = {}
    for read, held, largest in run_ranks(3, _reading, tmp_path):
        for name, length in held.items():
            assert read[f"model.{name}"] == length
            assert read.get(f"optimizer.{name}.exp_avg", length) == length
            total[name] = total.get(name, 0) + length
        assert set(held) | {"seen", "mask", "empty"} >= {name[6:] for name in read if name.startswith("model.")}
        assert largest <= max(held.values())
    assert total["embed.weight"] == 13 * 7


def test_copies_are_written_once_by_different_ranks(tmp_path: Path) -> None:
    save(tmp_path / "two", "flat-2")
    save(tmp_path / "four", "hybrid-2x2")
    sizes = {}
    for run in ("two", "four"):
        tensors = camshaft_checkpoint.inspect(folder(tmp_path / run, 3))["tensors"]
        sizes[run] = {name: (entry["shape"], entry["bytes"], entry["pieces"]) for name, entry in tensors.items()}
        assert camshaft_checkpoint.verify(folder(tmp_path / run, 3)) == []
    assert sizes["two"] == sizes["four"]
    files = [entry.stat().st_size for entry in files_of(folder(tmp_path / "four", 3)) if entry.suffix == ".safetensors"]
    assert len(files) == 4
    assert max(files) < 3 * min(files)


def test_later_steps_cannot_touch_a_snapshot_of_flat_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FlatRun(tmp_path, async_save=True)
    gate = Gate(monkeypatch)
    run.step()
    expected = everything_whole(run)
    run.plugin.post_step(run.state)
    assert gate.reached.wait(20)  # it is being written
    run.step()
    assert "up.weight/exp_avg" in differences(expected, everything_whole(run))
    gate.opened.set()
    run.plugin.close(run.state, "finished")
    loaded = FlatRun(tmp_path, model=Toy(seed=9))
    assert loaded.load()
    assert differences(expected, everything_whole(loaded)) == []


def _broken(rank: int, world_size: int, path: Path, how: str) -> str:
    run = FlatRun(path, rank, world_size)
    part = next(part for part in run.state.world.parts if part.pieces)
    first, *rest = part.pieces
    if rank == 1:
        start, length = (first.start, first.length - 1) if how == "hole" else (first.start - 1, first.length)
        part.pieces = (Piece(first.name, first.shape, start, first.place, length), *rest)
    run.count()
    try:
        run.plugin.post_step(run.state)
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(
    ("how", "told"), [("hole", "hold 14 elements of 'model.low', which has 15"), ("overlap", "twice")]
)
def test_pieces_that_are_not_each_element_once_are_refused(tmp_path: Path, how: str, told: str) -> None:
    for text in run_ranks(2, _broken, tmp_path, how):
        assert told in text
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_state_that_is_neither_single_nor_an_element_each_is_refused(tmp_path: Path) -> None:
    run = FlatRun(tmp_path)
    run.step()
    part = next(part for part in run.state.world.parts if len(part.pieces) > 1)
    run.state.optimizer.state[part.tensor]["rows"] = torch.zeros(4)
    with pytest.raises(CheckpointError, match=r"'rows' of 'embed.weight, up.weight' has shape \[4\]"):
        run.plugin.post_step(run.state)

    whole = Run(tmp_path)
    whole.step()
    whole.state.optimizer.state[whole.model.up.weight]["rows"] = torch.zeros(15)
    whole.plugin.post_step(whole.state)
    with pytest.raises(CheckpointError, match=r"optimizer.up.weight.rows: shape \[15\] in the checkpoint, \[15, 7\]"):
        FlatRun(tmp_path).load()


def _fully_sharded(rank: int, world_size: int, path: Path, more: int, flat: bool) -> Any:
    model = Plain()
    if flat:
        run: Run = FlatRun(path, rank, world_size, model=model)
    else:
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
        run = Run(path, rank, world_size, model=model)
    run.load()
    loaded = everything_whole(run)
    run.train(more)
    return loaded, everything_whole(run)


def test_dtensors_and_flat_buffers_read_each_other(tmp_path: Path) -> None:
    straight = Run(tmp_path / "straight", model=Plain())
    straight.train(6)
    _, second = run_ranks(2, _fully_sharded, tmp_path / "run", 2, False)[0]
    flat = run_ranks(3, _fully_sharded, tmp_path / "run", 2, True)
    for loaded, _ in flat:
        assert differences(second, loaded) == []
    for loaded, sixth in run_ranks(2, _fully_sharded, tmp_path / "run", 2, False):
        assert differences(flat[0][1], loaded) == []
        assert differences(everything_whole(straight), sixth) == []
