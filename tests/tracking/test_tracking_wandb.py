"""Against the real wandb in offline mode, read back from its run file. No connection leaves this machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tracking_records import eval_record, train_record
from wandb_file import run_files

from camshaft_jsonl import Plugin as Jsonl
from camshaft_wandb import Options, Plugin

CANARY = "canary5ecre7" + "0" * 28


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No key, no settings and no mode of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    (tmp_path / "home").mkdir()


def _run(state, records, status="finished", **options):
    plugin = Plugin(Options(system_metrics=False, close_timeout_s=30, **options))
    plugin.pre_run(state)
    for record in records:
        plugin.log(state, record)
    plugin.close(state, status)


def test_names_values_config_and_axes_are_in_the_run_file(make_state):
    plugin = Plugin(Options(project="shakespeare", tags=["ddp", "tiny"]))
    state = make_state({"wandb": plugin, "jsonl": Jsonl()})
    records = [train_record(10), eval_record(10), train_record(20, **{"plugin/checkpoint/save_s": 0.5})]
    _run(state, records, **plugin.options.model_dump(include={"project", "tags"}))
    (found,) = run_files(state.world.run.path)
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in found.history]
    assert rows == records
    assert found.metrics["*"] == "progress/global_step"
    assert "progress/global_step" in found.metrics
    assert (found.project, found.name, found.tags) == ("shakespeare", "quickstart-run", ["ddp", "tiny"])
    assert found.exit_code == 0
    expected = state.world.recipe.model_dump(mode="json")
    assert {key: found.config[key] for key in expected} == expected
    assert found.config["plugins"]["wandb"]["project"] == "shakespeare"


def test_a_resumed_run_continues_under_its_id_from_an_earlier_step(make_state):
    state = make_state()
    _run(state, [train_record(10), train_record(20), train_record(30)], status="interrupted")
    state = make_state(step=20)
    _run(state, [train_record(30), train_record(40)])
    first, second = run_files(state.world.run.path)
    assert first.id == second.id == (state.world.run.path / "wandb_id").read_text().strip()
    assert [row["progress/global_step"] for row in second.history] == [30, 40]
    assert (first.exit_code, second.exit_code) == (1, 0)


def test_a_sweep_agents_id_and_choices_are_kept(make_state, monkeypatch, tmp_path):
    parameters = tmp_path / "sweep.yaml"
    parameters.write_text("wandb_version: 1\nplugins.adamw.lr:\n  value: 0.001\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "agentrun")
    monkeypatch.setenv("WANDB_PROJECT", "agents-project")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    state = make_state()
    _run(state, [train_record(10)], project="of-the-recipe")
    (found,) = run_files(state.world.run.path)
    assert (found.id, found.sweep_id, found.project) == ("agentrun", "sweep123", "agents-project")
    assert found.config["plugins.adamw.lr"] == 0.001
    assert (state.world.run.path / "wandb_id").read_text() == "agentrun\n"


def test_a_server_that_accepts_and_hangs_delays_nothing_and_the_run_is_kept_offline(make_state, monkeypatch, caplog):
    """The key is a canary: it must be in no file of the run."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []
        threading.Thread(target=_accept_forever, args=(server, held), daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", CANARY)
        plugin = Plugin(Options(system_metrics=False, start_timeout_s=1.0, close_timeout_s=30, notes=f"key {CANARY}"))
        state = make_state({"wandb": plugin})
        start = time.monotonic()
        plugin.pre_run(state)
        for step in range(10, 60, 10):
            plugin.log(state, train_record(step))
        assert time.monotonic() - start < 0.5
        plugin.close(state, "finished")
        assert held, "the worker never tried the server"
        for connection in held:
            connection.close()
    (found,) = run_files(state.world.run.path)
    assert [row["progress/global_step"] for row in found.history] == [10, 20, 30, 40, 50]
    assert caplog.text.count("recording offline instead") == 1
    assert "no answer in time" in caplog.text
    files = [path for path in state.world.run.path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in caplog.text


def _accept_forever(server: socket.socket, held: list[socket.socket]) -> None:
    with suppress(OSError):  # the test has closed the server
        while True:
            held.append(server.accept()[0])


def test_a_killed_trainer_leaves_a_readable_run_and_no_process(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        from types import SimpleNamespace as NS
        from pathlib import Path
        from camshaft.recipe.schema import Recipe, Batch
        from camshaft_wandb import Options, Plugin
        recipe = Recipe(schema_version=1, name="x", batch=Batch(micro_batch_size=1, global_batch_size=1))
        state = NS(world=NS(is_main=True, recipe=recipe, run=NS(path=Path(sys.argv[1]))), step=0)
        plugin = Plugin(Options(system_metrics=False, mode="offline"))
        plugin.pre_run(state)
        plugin.log(state, {"train/loss": 5.0, "progress/global_step": 10})
        while plugin._client._records:  # what left the queue is the worker's, and must survive
            time.sleep(0.05)
        print("recorded", flush=True)
        time.sleep(60)
        """
    )
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "recorded\n"
        (worker,) = _children(trainer.pid)
        service = _children(worker)
        assert service
        trainer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 12
    while any(_alive(process) for process in (worker, *service)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(process) for process in (worker, *service))
    (found,) = run_files(run)
    assert [row["train/loss"] for row in found.history] == [5.0]
    assert found.exit_code == 1


def _children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_disabled_and_other_ranks_start_nothing(make_state, mode):
    state = make_state(is_main=mode == "disabled")
    _run(state, [train_record(10)], mode=mode)
    assert list(state.world.run.path.iterdir()) == []


@pytest.mark.parametrize("project", ["a/b", "50%", "x" * 129, "", "what?"])
def test_a_project_name_that_wandb_refuses_is_a_problem_of_the_recipe(project):
    (problem,) = Plugin(Options(project=project)).plan().problems
    assert problem.key == "plugins.wandb.project"
    assert problem.fix


def test_a_good_project_name_is_no_problem_and_nothing_is_claimed():
    plan = Plugin(Options(project="llama-3_8b v2")).plan()
    assert plan.problems == () and plan.claims == ()


def test_the_recipe_holds_no_key():
    with pytest.raises(ValueError, match="api_key"):
        Options(api_key="x")


def test_loading_the_plugin_imports_neither_torch_nor_wandb():
    script = "import sys, camshaft_wandb; print(sorted({'torch', 'wandb', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\[\]\n", done.stdout)
