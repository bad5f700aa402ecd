"""Damage is found before any weight changes, named, and the last good checkpoint is used."""

from __future__ import annotations

import ast
import json
import logging
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_toy import Run, Toy, differences, everything, files_of, folder, steps

import camshaft_checkpoint
from camshaft.errors import CheckpointError
from camshaft.testing.ranks import run_ranks
from camshaft_checkpoint import files, index, manifest, tensorfile

PACKAGE = Path(camshaft_checkpoint.__file__).parent


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def seal(checkpoint: Path) -> None:
    """What an attacker would do: a manifest that fits the files as they are now."""
    old = manifest.read(checkpoint)
    records = [
        files.Record(entry.name, entry.stat().st_size, files.sha256(entry))
        for entry in files_of(checkpoint)
        if entry.name != manifest.NAME
    ]
    (checkpoint / manifest.NAME).write_bytes(manifest.Manifest(old.step, old.world_size, tuple(records)).encode())


def _train(rank: int, world_size: int, path: Path, steps: int) -> None:
    Run(path, rank, world_size).train(steps)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with two checkpoints. Tests copy it."""
    path = tmp_path_factory.mktemp("pristine")
    run_ranks(2, _train, path, 2)
    assert steps(path) == [1, 2]
    return path


@pytest.fixture
def damaged(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def test_200_bit_flips_and_50_truncations_are_all_detected(pristine: Path, tmp_path: Path) -> None:
    chance = random.Random(20)
    run = Run(tmp_path / "run", model=Toy(seed=9))
    before = everything(run.state)
    original = folder(pristine, 2)
    names = [entry.name for entry in files_of(original)]
    assert names == ["index.json", "manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
    target = folder(tmp_path / "run", 2)
    shutil.copytree(original, target)
    undetected = []
    for number in range(250):
        name = names[number % len(names)]
        size = (original / name).stat().st_size
        if number < 200:
            flip(target / name, chance.randrange(8 * size))
        else:
            truncate(target / name, chance.randrange(size))
        faults = camshaft_checkpoint.verify(target)
        if not (faults and name in faults[0]):
            undetected.append((number, name, faults))
        with pytest.raises(CheckpointError, match=f"nothing was loaded[^$]*{name}"):
            run.load()
        shutil.copy(original / name, target / name)
    assert undetected == []
    assert differences(before, everything(run.state)) == []
    assert camshaft_checkpoint.verify(target) == []
    assert run.load()  # and without damage it does load


def test_every_byte_of_a_manifest_counts(damaged: Path) -> None:
    checkpoint = folder(damaged, 2)
    path = checkpoint / manifest.NAME
    original = path.read_bytes()
    chance = random.Random(7)
    for place in range(len(original)):
        changed = bytearray(original)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            manifest.read(checkpoint)
    for more in (b"\n", b" ", b"x"):
        path.write_bytes(original + more)
        with pytest.raises(CheckpointError, match="altered"):
            manifest.read(checkpoint)


def _lose(checkpoint: Path) -> None:
    (checkpoint / "rank_00001.safetensors").unlink()


def _swap(checkpoint: Path) -> None:
    first, second, aside = (checkpoint / f"rank_{name}.safetensors" for name in ("00000", "00001", "aside"))
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def _mix(checkpoint: Path) -> None:
    shutil.copy(folder(checkpoint.parent.parent, 1) / "rank_00000.safetensors", checkpoint)


def _link(checkpoint: Path) -> None:
    path = checkpoint / "rank_00000.safetensors"
    path.rename(checkpoint.parent / "elsewhere")
    path.symlink_to(checkpoint.parent / "elsewhere")


def _lose_manifest(checkpoint: Path) -> None:
    (checkpoint / manifest.NAME).unlink()


def _older_contents(checkpoint: Path) -> None:
    for entry in files_of(folder(checkpoint.parent.parent, 1)):
        shutil.copy(entry, checkpoint)


def _newer_format(checkpoint: Path) -> None:
    path = checkpoint / manifest.NAME
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


def _empty_all(checkpoint: Path) -> None:
    for entry in files_of(checkpoint):
        entry.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_lose, r"rank_00001\.safetensors: missing"),
        (_swap, r"rank_00000\.safetensors"),
        (_mix, r"rank_00000\.safetensors: contents changed"),
        (_link, r"rank_00000\.safetensors: not a regular file"),
        (_lose_manifest, r"manifest\.json: missing"),
        (_older_contents, "written for step 1, found in step_00000002"),
        (_newer_format, "format 2, and this Camshaft reads format 1"),
        (_empty_all, r"manifest\.json: altered or truncated"),
    ],
)
def test_the_one_before_is_used_and_the_fault_named(
    damaged: Path, damage: Callable[[Path], None], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = Run(damaged.parent / "other", resume=str(folder(damaged, 1)), model=Toy(seed=9))
    assert good.load()
    damage(folder(damaged, 2))
    run = Run(damaged, model=Toy(seed=8))
    assert run.load()
    assert run.state.step == 1
    assert differences(everything(good.state), everything(run.state)) == []
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "CHECKPOINT DAMAGED" in warnings[0]
    assert re.search(named, warnings[0])
    run.train(1)  # step 2 again: the damaged one is replaced by a good one
    assert steps(damaged) == [1, 2]
    assert camshaft_checkpoint.verify(folder(damaged, 2)) == []


def test_all_damaged_is_an_error_that_lists_all(damaged: Path) -> None:
    flip(folder(damaged, 1) / "rank_00001.safetensors", 4000)
    truncate(folder(damaged, 2) / "index.json", 10)
    run = Run(damaged, model=Toy(seed=9))
    before = everything(run.state)
    with pytest.raises(CheckpointError) as caught:
        run.load()
    assert "step_00000001: " in str(caught.value)
    assert "rank_00001.safetensors: contents changed" in str(caught.value)
    assert "step_00000002: " in str(caught.value)
    assert "index.json: has 10 bytes" in str(caught.value)
    assert differences(before, everything(run.state)) == []


def _load_on(rank: int, world_size: int, path: Path) -> Any:
    run = Run(path, rank, world_size, model=Toy(seed=9))
    run.load()
    return run.state.step


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00001.safetensors", "index.json"])
def test_ranks_agree_whoever_finds_the_damage(damaged: Path, name: str) -> None:
    flip(folder(damaged, 2) / name, 999)
    assert run_ranks(2, _load_on, damaged) == [1, 1]


HUGE = 1 << 62


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "U8", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


TWELVE = json.dumps(entry([12], 0, 12))
HEADERS: dict[str, Any] = {
    "longer than the file": (1 << 63).to_bytes(8, "little"),
    "above the limit": (tensorfile.MAX_HEADER + 1).to_bytes(8, "little"),
    "no room for a length": b"\x01\x00",
    "not JSON": b"{nonsense",
    "not UTF-8": b"\xff\xfe\xfd",
    "a list": [],
    "deep": b"[" * 100_000,
    "hole": {"a": entry([4], 0, 4), "b": entry([4], 8, 12)},
    "overlap": {"a": entry([8], 0, 8), "b": entry([8], 4, 12)},
    "past the end": {"a": entry([64], 0, 64)},
    "before the end": {"a": entry([8], 0, 8)},
    "backwards": {"a": entry([0], 12, 0)},
    "huge shape": {"a": entry([HUGE, HUGE, HUGE], 0, 12, "F64")},
    "negative": {"a": entry([-12, -1], 0, 12)},
    "floats": {"a": entry([12.0], 0, 12)},
    "booleans": {"a": entry([True], 0, True)},
    "unknown dtype": {"a": entry([12], 0, 12, "OBJECT")},
    "dtype no name": {"a": entry([12], 0, 12, ["U8"])},
    "extra field": {"a": entry([12], 0, 12, code="x")},
    "entry no object": {"a": 5},
    "twice": f'{{"a": {TWELVE}, "a": {TWELVE}}}'.encode(),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_typed_errors(damaged: Path, case: str) -> None:
    content = HEADERS[case]
    if isinstance(content, dict | list):
        content = json.dumps(content).encode()
    if case not in ("longer than the file", "above the limit", "no room for a length"):
        content = len(content).to_bytes(8, "little") + content + bytes(12)
    path = folder(damaged, 2) / "rank_00000.safetensors"
    path.write_bytes(content)
    seal(folder(damaged, 2))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors"):
            tensorfile.read_header(path)
        faults = camshaft_checkpoint.verify(folder(damaged, 2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert any("rank_00000.safetensors" in fault for fault in faults)
    assert peak < 8 << 20
    run = Run(damaged, model=Toy(seed=9))
    assert run.load()
    assert run.state.step == 1


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        table = json.loads(path.read_bytes())
        change(table)
        path.write_text(json.dumps(table))

    return apply


def _first_piece(table: dict[str, Any]) -> dict[str, Any]:
    piece: dict[str, Any] = table["tensors"]["model.up.weight"]["pieces"][0]
    return piece


INDEXES: dict[str, Callable[[Path], None]] = {
    "not JSON": lambda path: path.write_bytes(b"{") and None,
    "deep": lambda path: path.write_bytes(b"[" * 100_000) and None,
    "no document": _edit(lambda table: table.pop("document")),
    "leaves the folder": _edit(lambda table: _first_piece(table).update(file="../../secret.safetensors")),
    "unknown key": _edit(lambda table: _first_piece(table).update(key="model.other@0,0")),
    "outside": _edit(lambda table: _first_piece(table).update(offsets=[1, 0])),
    "not covered": _edit(lambda table: table["tensors"]["model.up.weight"].update(pieces=[])),
    "huge": _edit(lambda table: table["tensors"]["model.up.weight"].update(shape=[HUGE, HUGE])),
    "dtype": _edit(lambda table: table["tensors"]["model.up.weight"].update(dtype="F64")),
    "unknown dtype": _edit(lambda table: table["tensors"]["model.up.weight"].update(dtype="PICKLE")),
    "no table": _edit(lambda table: table.update(tensors=[1])),
}


@pytest.mark.parametrize("case", INDEXES)
def test_hostile_indexes_are_faults(damaged: Path, case: str) -> None:
    INDEXES[case](folder(damaged, 2) / index.NAME)
    seal(folder(damaged, 2))
    faults = camshaft_checkpoint.verify(folder(damaged, 2))
    assert faults
    run = Run(damaged, model=Toy(seed=9))
    assert run.load()
    assert run.state.step == 1


@pytest.mark.parametrize("missing", ["state", "optimizer", "components"])
def test_an_incomplete_document_is_an_error_before_anything_is_written(damaged: Path, missing: str) -> None:
    _edit(lambda table: table["document"].pop(missing))(folder(damaged, 2) / index.NAME)
    seal(folder(damaged, 2))
    run = Run(damaged, model=Toy(seed=9))
    before = everything(run.state)
    with pytest.raises(CheckpointError, match="malformed index"):
        run.load()
    assert differences(before, everything(run.state)) == []


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "", ".hidden", "manifest.json", "x\x00"])
def test_manifests_cannot_name_files_elsewhere(damaged: Path, name: str) -> None:
    checkpoint = folder(damaged, 2)
    found = manifest.read(checkpoint)
    evil = manifest.Manifest(found.step, found.world_size, (*found.files, files.Record(name, 1, "0" * 64)))
    (checkpoint / manifest.NAME).write_bytes(evil.encode())
    with pytest.raises(CheckpointError, match="not a file name of a checkpoint"):
        manifest.read(checkpoint)


def test_the_package_neither_imports_nor_calls_anything_that_executes_data() -> None:
    forbidden = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "eval", "exec", "compile", "__import__"}
    found = []
    sources = sorted(PACKAGE.glob("*.py"))
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names: set[str] = set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {part for alias in node.names for part in alias.name.split(".")}
                names |= set((getattr(node, "module", None) or "").split("."))
            elif isinstance(node, ast.Name):
                names = {node.id}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                names = {"pickle"} if node.attr in ("load", "save") else set()
            elif isinstance(node, ast.keyword) and node.arg == "weights_only":
                names = {"pickle"}
            found += [(source.name, name) for name in names & forbidden]
    assert found == []


def _audited_load(rank: int, world_size: int, path: Path) -> Any:
    (folder(path, 2) / ".metadata").write_bytes(b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.")
    run = Run(path, model=Toy(seed=9))
    opened: set[str] = set()
    executed: list[str] = []

    def hook(event: str, arguments: Any) -> None:
        if event.startswith("pickle.") or event in ("os.system", "subprocess.Popen"):
            executed.append(event)
        if event == "open" and isinstance(arguments[0], str) and str(path) in arguments[0]:
            opened.add(Path(arguments[0]).name)

    sys.addaudithook(hook)
    run.load()
    run.train(1)
    return run.state.step, executed, sorted(opened)


def test_loading_and_saving_run_no_pickle(damaged: Path) -> None:
    step, executed, opened = run_ranks(1, _audited_load, damaged)[0]
    assert step == 3
    assert executed == []
    assert "manifest.json" in opened
    assert ".metadata" not in opened


def test_looking_at_checkpoints_needs_no_torch(damaged: Path) -> None:
    flip(folder(damaged, 2) / "rank_00000.safetensors", 5000)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import camshaft_checkpoint as c\n"
        f"found = c.inspect({str(damaged / 'checkpoints')!r})\n"
        "shape = found['tensors']['model.up.weight']['shape']\n"
        "print(found['step'], found['world_size'], shape, found['state']['step'])\n"
        f"print(c.verify({str(folder(damaged, 1))!r}), len(c.verify({str(folder(damaged, 2))!r})))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert output.stdout.splitlines() == ["2 2 [15, 7] 2", "[] 1"]


def test_inspect_refuses_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        camshaft_checkpoint.inspect(tmp_path)
    assert camshaft_checkpoint.verify(tmp_path) == [f"there is no checkpoint at {tmp_path}"]
