"""The cache of built data: seen whole or not at all, by any number of processes, killed or not."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from camshaft.data import cache
from camshaft.errors import MachineError

FORK = multiprocessing.get_context("fork")


def fill(folder: Path, text: str = "tokens") -> None:
    (folder / "tokens.bin").write_text(text)
    (folder / "tokens.idx").write_text("index")


def refuse(folder: Path) -> None:
    raise AssertionError("built again")


def test_an_entry_is_built_once(tmp_path):
    entry = cache.fetch(tmp_path, "k", fill)
    assert (entry / "tokens.bin").read_text() == "tokens"
    assert cache.fetch(tmp_path, "k", refuse) == entry
    assert sorted(json.loads((entry / cache.MANIFEST).read_text())) == ["tokens.bin", "tokens.idx"]
    before = cache.content_key(entry)
    other = cache.fetch(tmp_path, "l", lambda folder: fill(folder, "other!"))
    assert cache.content_key(other) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "tokens.bin").write_text("token"),
        lambda entry: (entry / "tokens.bin").unlink(),
        lambda entry: (entry / "tokens.idx").write_text("indeX"),
        lambda entry: (entry / cache.MANIFEST).write_text("{}"),
        lambda entry: (entry / cache.MANIFEST).write_text('{"tokens.bin": 5}'),
        lambda entry: (entry / cache.MANIFEST).write_text("[1]"),
        lambda entry: (entry / cache.MANIFEST).unlink(),
    ],
)
def test_a_damaged_entry_is_built_again(tmp_path, damage):
    entry = cache.fetch(tmp_path, "k", fill)
    damage(entry)
    assert not cache.intact(entry)
    cache.fetch(tmp_path, "k", fill)
    assert cache.intact(entry)
    assert sorted(path.name for path in entry.iterdir()) == [cache.MANIFEST, "tokens.bin", "tokens.idx"]
    cache.fetch(tmp_path, "k", refuse)


def test_an_error_leaves_nothing_and_the_next_build_works(tmp_path):
    def fail(folder):
        fill(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.fetch(tmp_path, "k", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".k.lock"]
    assert cache.intact(cache.fetch(tmp_path, "k", fill))


def build_slowly(root, started, log):
    def build(folder):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        started.set()
        (folder / "tokens.bin").write_text("half")
        time.sleep(0.3)
        fill(folder)

    entry = cache.fetch(root, "k", build)
    os._exit(0 if cache.intact(entry) and (entry / "tokens.bin").read_text() == "tokens" else 1)


def test_processes_at_once_build_once_and_all_see_the_whole(tmp_path):
    log, root, started = tmp_path / "log", tmp_path / "cache", FORK.Event()
    processes = [FORK.Process(target=build_slowly, args=(root, started, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(log.read_text().split()) == 1


def build_for_ever(root, started):
    def build(folder):
        fill(folder)
        started.set()
        time.sleep(60)

    cache.fetch(root, "k", build)


def test_a_killed_build_is_invisible_and_does_not_hold_the_lock(tmp_path):
    started = FORK.Event()
    process = FORK.Process(target=build_for_ever, args=(tmp_path, started))
    process.start()
    try:
        assert started.wait(20)
        left = [path for path in tmp_path.iterdir() if path.is_dir()]
        assert len(left) == 1
        assert (left[0] / "tokens.bin").is_file()
        assert not (tmp_path / "k").exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(20)
    assert not (tmp_path / "k").exists()
    entry = cache.fetch(tmp_path, "k", fill)
    assert cache.intact(entry)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".k.lock", "k"], "what was left is removed"


def test_a_folder_that_cannot_be_written_is_a_fault_of_the_machine(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MachineError, match=r"cache folder .*file/c cannot be used: .*Set data\.cache_dir"):
        cache.fetch(blocked / "c", "k", fill)

    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(MachineError, match="No space left on device"):
        cache.fetch(tmp_path / "c", "k", full)
    assert MachineError.exit_status == 3


@pytest.mark.parametrize(
    ("setting", "environ", "expected"),
    [
        ("/data/c", {"XDG_CACHE_HOME": "/x"}, "/data/c"),
        (None, {"XDG_CACHE_HOME": "/x"}, "/x/camshaft"),
        (None, {"XDG_CACHE_HOME": "relative"}, str(Path.home() / ".cache/camshaft")),
        (None, {}, str(Path.home() / ".cache/camshaft")),
    ],
)
def test_where_the_cache_is(setting, environ, expected):
    assert str(cache.folder(setting, environ)) == expected


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(MachineError, match=r"Set data\.cache_dir"):
        cache.folder(None, {})
    assert str(cache.folder("/c", {})) == "/c"


def test_digests_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    file, root = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("one")
    first = cache.Digests(root)(file)
    counted = []
    original = cache.file_digest
    monkeypatch.setattr(cache, "file_digest", lambda path: counted.append(path) or original(path))
    assert cache.Digests(root)(file) == first == original(file)
    assert counted == []
    time.sleep(0.01)
    file.write_text("two")
    assert cache.Digests(root)(file) == original(file) != first
    assert counted == [file]
    (note,) = (root / "digests").iterdir()
    note.write_text("garbage")
    assert cache.Digests(root)(file) == original(file)
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    assert cache.Digests(blocked / "c")(file) == original(file)
