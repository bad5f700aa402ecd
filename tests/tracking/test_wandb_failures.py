"""A wandb that is absent, slow, stuck or broken, played by a package of that name that the worker finds first."""

from __future__ import annotations

import json
import os
import textwrap
import time
from pathlib import Path

import pytest
from tracking_records import train_record

from camshaft_wandb import Options, Plugin, client
from camshaft_wandb.identity import public, resolve_mode, run_id

FAKE = textwrap.dedent(
    """
    import json, os, time
    from types import SimpleNamespace

    fault = os.environ["FAKE_FAULT"]
    if fault == "absent":
        raise ModuleNotFoundError("No module named 'wandb'")
    if fault == "import hangs":
        time.sleep(60)

    class errors:
        class UsageError(Exception): pass
        class AuthenticationError(Exception): pass

    class Settings(SimpleNamespace): pass

    def login():
        if fault == "no key":
            raise errors.UsageError("No API key configured")
        if fault == "key refused":
            raise errors.AuthenticationError("401")
        return True

    def init(*, mode, dir, **more):
        note("init", mode)
        if fault == "init hangs" or (fault == "init hangs online" and mode == "online"):
            time.sleep(60)
        if fault == "init raises":
            raise RuntimeError("no luck")
        if fault == "dies in init" and mode == "online":
            os._exit(9)
        return Run(mode, dir)

    class Artifact:
        def __init__(self, **more):
            if fault == "artifact hangs":
                time.sleep(60)

    def note(*words):
        with open(os.environ["FAKE_NOTES"], "a") as file:
            file.write(json.dumps(words) + "\\n")

    class Run:
        def __init__(self, mode, dir):
            self.mode, self.dir, self.url = mode, dir + "/wandb/offline-run-1/files", None

        def define_metric(self, *names, **more):
            pass

        def log(self, record):
            step = record["progress/global_step"]
            if fault == "log raises" and step % 2:
                raise ValueError("odd")
            if fault == "log hangs":
                time.sleep(60)
            if fault == "dies in log" and self.mode == "online" and step == 3:
                os._exit(9)
            note("log", step)

        def finish(self, exit_code):
            if fault == "finish hangs":
                time.sleep(60)
            if fault == "finish raises":
                raise RuntimeError("not today")
            note("finish", exit_code)
    """
)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """``fake(fault)`` makes workers meet that fault; ``fake.notes()`` is what the fake was called with."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    package = tmp_path / "fake" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    notes = tmp_path / "notes"
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("FAKE_NOTES", str(notes))

    def use(fault: str) -> None:
        monkeypatch.setenv("FAKE_FAULT", fault)

    use.notes = lambda: [tuple(json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []
    return use


def _run(state, *, steps=5, pause=0.0, **options):
    """Run through all hooks; returns the seconds of ``pre_run``, of nine ``log`` in ten at most, and of ``close``."""
    plugin = Plugin(Options(**({"close_timeout_s": 10.0} | options)))
    moments = [time.perf_counter()]
    plugin.pre_run(state)
    moments.append(time.perf_counter())
    logs = []
    for step in range(1, steps + 1):
        start = time.perf_counter()
        plugin.log(state, train_record(step))
        logs.append(time.perf_counter() - start)
        time.sleep(pause)
    start = time.perf_counter()
    plugin.close(state, "finished")
    assert _own_workers() == []
    return moments[1] - moments[0], sorted(logs)[len(logs) * 9 // 10], time.perf_counter() - start


def _read(path: Path) -> bytes:
    """What a thread's or process' file says; nothing once it has ended."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _own_workers() -> list[int]:
    tasks = Path("/proc/self/task").iterdir()
    children = [child for task in tasks for child in _read(task / "children").split()]
    return [int(child) for child in children if b"camshaft_wandb" in _read(Path(f"/proc/{child.decode()}/cmdline"))]


def _logged(notes) -> list[int]:
    return [what for kind, what in notes if kind == "log"]


@pytest.mark.parametrize("fault", ["import hangs", "init hangs", "log hangs", "finish hangs", "artifact hangs"])
def test_a_wandb_that_hangs_costs_no_time_but_the_closing_time(make_state, fake, caplog, fault):
    fake(fault)
    state = make_state()
    (state.world.run.path / "recipe.yaml").write_text("name: x")
    start, log, close = _run(state, steps=200, start_timeout_s=0.5, close_timeout_s=1.5, artifacts=["recipe"])
    assert start < 0.5
    assert log < 1e-3
    assert close < 1.5 + 1.5
    assert "W&B" in caplog.text
    assert len(caplog.records) <= 3


def test_what_waited_for_the_server_is_recorded_offline(make_state, fake, caplog):
    fake("init hangs online")
    _run(make_state(), start_timeout_s=0.3)
    assert fake.notes() == [
        ("init", "online"), ("init", "offline"), *(("log", step) for step in range(1, 6)), ("finish", 0)
    ]  # fmt: skip
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "W&B: no answer in time; recording offline instead"
    ]


def test_a_short_run_does_not_wait_for_the_servers_whole_time(make_state, fake):
    fake("init hangs online")
    _, _, close = _run(make_state(), start_timeout_s=90.0, close_timeout_s=6.0)
    assert close < 7.5
    assert _logged(fake.notes()) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault", ["key refused", "dies in init"])
def test_a_failed_start_falls_back_to_offline_and_is_said_once(make_state, fake, caplog, fault):
    fake(fault)
    _run(make_state())
    assert fake.notes()[-6:-1] == [("log", step) for step in range(1, 6)]
    assert [record.getMessage().partition(" (")[0].partition("; ")[2] for record in caplog.records] == [
        "recording offline instead"
    ]


@pytest.mark.parametrize(
    ("mode", "fault", "chosen"),
    [("auto", "", "online"), ("auto", "no key", "offline"), ("online", "", "online"), ("offline", "", "offline")],
)
def test_the_mode_follows_the_key_and_the_option(make_state, fake, caplog, mode, fault, chosen):
    fake(fault)
    _run(make_state(), mode=mode)
    assert fake.notes()[0] == ("init", chosen)
    assert fake.notes()[-1] == ("finish", 0)
    assert caplog.records == []


def test_an_init_that_raises_everywhere_turns_wandb_off(make_state, fake, caplog):
    fake("init raises")
    _run(make_state())
    assert "RuntimeError: no luck; W&B is off" in caplog.text
    assert "5 record(s) did not reach W&B" in caplog.text
    assert fake.notes() == [("init", "online"), ("init", "offline")]


def test_an_absent_wandb_is_tried_and_said_once(make_state, fake, caplog):
    fake("absent")
    _run(make_state())
    assert caplog.text.count("No module named 'wandb'; W&B is off") == 1
    assert "recording offline" not in caplog.text


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("log raises", "refused 3 call(s); the first: ValueError: odd"),
        ("finish raises", "refused 1 call(s); the first: RuntimeError: not today"),
    ],
)
def test_calls_that_raise_are_counted(make_state, fake, caplog, fault, said):
    fake(fault)
    _run(make_state())
    assert said in caplog.text
    assert _logged(fake.notes()) == ([2, 4] if fault == "log raises" else [1, 2, 3, 4, 5])


def test_a_worker_that_dies_in_the_middle_is_replaced_by_an_offline_one(make_state, fake, caplog):
    fake("dies in log")
    _run(make_state(), steps=12, pause=0.2)
    logged = _logged(fake.notes())
    assert logged[:2] == [1, 2] and logged[-1] == 12
    assert logged == sorted(set(logged))
    assert ("init", "offline") in fake.notes()
    assert caplog.text.count("its process ended with status 9; recording offline instead") == 1


def test_a_full_queue_drops_the_oldest_records_and_counts_them(make_state, fake, caplog, monkeypatch):
    monkeypatch.setattr(client, "QUEUE_RECORDS", 4)
    fake("init hangs online")
    _run(make_state(), steps=10, start_timeout_s=0.3)
    assert _logged(fake.notes()) == [7, 8, 9, 10]
    assert "6 record(s) did not reach W&B" in caplog.text


def test_a_value_that_is_no_number_costs_its_record_only(make_state, fake, caplog):
    fake("")
    plugin = Plugin()
    plugin.pre_run(make_state())
    plugin.log(make_state(), train_record(1, **{"plugin/x/y": None}))
    plugin.log(make_state(), train_record(2, **{"plugin/x/y": object()}))
    plugin.log(make_state(), train_record(3))
    plugin.close(make_state(), "finished")
    assert _logged(fake.notes())[-1] == 3
    assert 2 not in _logged(fake.notes())
    assert "1 record(s) did not reach W&B" in caplog.text


def test_a_run_directory_that_cannot_be_written_turns_wandb_off(make_state, fake, caplog):
    fake("")
    state = make_state()
    state.world.run.path = state.world.run.path / "file"
    state.world.run.path.write_text("in the way")
    _run(state)
    assert caplog.text.count("W&B is off") == 1
    assert fake.notes() == []


@pytest.mark.parametrize(
    ("option", "environment", "mode"),
    [
        ("auto", "", "auto"),
        ("auto", "online", "online"),
        ("auto", "offline", "offline"),
        ("auto", "dryrun", "offline"),
        ("auto", "disabled", "disabled"),
        ("online", "offline", "offline"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "shared", "online"),
        ("auto", "run", "online"),
    ],
)
def test_the_more_private_of_recipe_and_environment_is_the_mode(option, environment, mode):
    assert resolve_mode(option, {"WANDB_MODE": environment}) == mode
    assert resolve_mode(option, {}) == option


def test_the_id_is_made_once_and_kept(tmp_path):
    path = tmp_path / "run" / "wandb_id"
    first = run_id(path, {})
    assert run_id(path, {}) == first
    assert run_id(path, {"WANDB_RUN_ID": "agents"}) == "agents"
    assert run_id(path, {}) == "agents"
    path.write_text("torn\0/id")
    assert run_id(path, {}) not in ("agents", first, "torn\0/id")


def test_what_wandb_sees_has_no_secret_and_everything_else():
    tree = {
        "tokenizer": {"type": "bpe", "path": "https://me:hunter2@host/t.json"},
        "training": {"max_tokens": 5},
        "data": {"json_key": "text", "blend": [{"prefix": "a", "weight": 0.5}]},
        "plugins": {
            "x": {"api_key": "1", "hub_token": "2", "db_password": "3", "aws_secret_access_key": "4", "k": "aKEYb"}
        },
        "model": {"num_key_value_heads": 2, "tie_word_embeddings": None},
    }
    assert public(tree, {"WANDB_API_KEY": "KEY"}) == {
        "tokenizer": {"type": "bpe", "path": "[removed]"},
        "training": {"max_tokens": 5},
        "data": {"json_key": "text", "blend": [{"prefix": "a", "weight": 0.5}]},
        "plugins": {"x": {"k": "[removed]"}},
        "model": {"num_key_value_heads": 2, "tie_word_embeddings": None},
    }
