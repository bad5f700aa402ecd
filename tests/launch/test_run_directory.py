"""The run directory: names, status, lock, links, and which directory a command takes."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from camshaft.errors import MachineError
from camshaft.recipe.schema import Run
from camshaft.rundir import RunDirectory, choose, digest

VALUES = {"name": "r", "seed": 1, "run": {"dir": None}, "plugins": {"b": {}, "a": {}}}


def test_folders_and_paths(tmp_path):
    run = RunDirectory(tmp_path / "a" / "b").create()
    assert run.checkpoints.is_dir() and run.logs.is_dir() and run.metrics == run.path / "metrics.jsonl"
    assert run.read_status() == {} and run.id == "b"


def test_status_is_merged_and_always_whole(tmp_path):
    run = RunDirectory(tmp_path).create()
    run.write_status(state="running", step=0, note="x" * 4000)
    done, torn = threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            status = json.loads((tmp_path / "status.json").read_text())
            if len(status["note"]) != 4000 or status["state"] != "running":
                torn.append(status)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for step in range(300):
        run.write_status(step=step)
    done.set()
    watcher.join()
    assert not torn
    assert run.read_status()["step"] == 299 and run.id == tmp_path.name
    assert [path.name for path in tmp_path.glob(".status*")] == []


def test_a_torn_status_reads_as_none(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "run')
    assert RunDirectory(tmp_path).read_status() == {}


def test_files_of_the_first_start_are_kept(tmp_path):
    run = RunDirectory(tmp_path).create()
    assert run.keep("recipe.yaml", "a: 1") == tmp_path / "recipe.yaml"
    assert run.keep("recipe.yaml", "a: 1") == tmp_path / "recipe.yaml"
    other = run.keep("recipe.yaml", "a: 2")
    assert (tmp_path / "recipe.yaml").read_text() == "a: 1"
    assert other != tmp_path / "recipe.yaml" and other.read_text() == "a: 2" and other.suffix == ".yaml"


def test_only_a_whole_checkpoint_can_be_continued_from(tmp_path):
    run = RunDirectory(tmp_path)
    assert "from step 0" in run.going_on()
    (run.create().checkpoints / "step_8.tmp").mkdir()
    assert "from step 0" in run.going_on()
    (run.checkpoints / "step_4").mkdir()
    assert "continues from the last checkpoint" in run.going_on()


@pytest.mark.parametrize("name", ["logs", "checkpoints"])
def test_links_out_of_the_root_are_refused(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MachineError, match="outside"):
        RunDirectory(tmp_path / "run").create()


def test_a_name_folder_that_leads_out_of_the_root_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "r").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MachineError, match="outside"):
        choose(Run(root=str(tmp_path / "runs")), "r", "d")


def test_a_root_may_be_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    choice = choose(Run(root=str(tmp_path / "runs")), "r", "d")
    assert (tmp_path / "scratch" / "r" / choice.directory.path.name).is_dir()


@pytest.mark.parametrize("name", ["..", "a/b", "/etc", ".hidden", "", "x" * 65, "a\nb"])
def test_names_that_are_no_folder_names_are_refused(tmp_path, name):
    with pytest.raises(MachineError, match="cannot be a folder name"):
        choose(Run(root=str(tmp_path)), name, "d")


def test_a_folder_that_cannot_be_locked_is_a_machine_error(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(MachineError, match=r"cannot be locked: .*Is a directory.* Give another run.dir"):
        RunDirectory(tmp_path).lock()


def test_a_folder_that_cannot_be_made_is_a_machine_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"run\.root"):
        RunDirectory(tmp_path / "file" / "run").create()


def test_the_lock_names_its_holder_and_is_freed_when_that_is_killed(tmp_path):
    code = (
        "import sys, time; from camshaft.rundir import RunDirectory; "
        "lock = RunDirectory(sys.argv[1]).lock(); print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(MachineError, match=rf"in use by process {holder.pid}\b"):
            RunDirectory(tmp_path).lock()
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        lock = RunDirectory(tmp_path).lock()
        assert (tmp_path / ".lock").read_text().strip() == str(os.getpid())
        assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o600
        lock.release()
        RunDirectory(tmp_path).lock().release()
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


def test_the_digest_leaves_out_run_and_keeps_the_order_of_plugins():
    assert digest(VALUES) == digest(VALUES | {"run": {"dir": "x"}})
    assert digest(VALUES) != digest(VALUES | {"seed": 2})
    assert digest(VALUES) != digest(VALUES | {"plugins": {"a": {}, "b": {}}})


class TestChoose:
    """``runs/<name>/latest`` is continued only where the same command would have gone on."""

    def start(self, root, state="running", recipe="d"):
        choice = choose(Run(root=str(root)), "r", "d")
        choice.directory.write_status(state=state, digest=recipe)
        choice.lock.release()
        return choice

    def test_a_new_run_is_pointed_at_by_a_relative_link(self, tmp_path):
        choice = self.start(tmp_path)
        latest = tmp_path / "r" / "latest"
        assert not choice.continued and str(latest.readlink()) == choice.directory.path.name
        assert latest.resolve() == choice.directory.path.resolve()

    @pytest.mark.parametrize("state", ["running", "interrupted", "failed"])
    def test_an_unfinished_run_is_continued(self, tmp_path, state):
        first = self.start(tmp_path, state)
        again = choose(Run(root=str(tmp_path)), "r", "d")
        assert again.continued and again.directory.path == first.directory.path
        assert state in again.message and "--fresh" in again.message

    @pytest.mark.parametrize(("state", "recipe"), [("finished", "d"), ("failed", "another recipe")])
    def test_a_finished_run_or_another_recipe_gets_a_new_one(self, tmp_path, state, recipe):
        first = self.start(tmp_path, state, recipe)
        again = choose(Run(root=str(tmp_path)), "r", "d")
        assert not again.continued and again.directory.path != first.directory.path

    def test_a_run_that_somebody_works_on_is_left_alone(self, tmp_path):
        first = choose(Run(root=str(tmp_path)), "r", "d")
        first.directory.write_status(state="running", digest="d")
        second = choose(Run(root=str(tmp_path)), "r", "d")
        assert not second.continued and second.directory.path != first.directory.path
        first.lock.release()

    def test_fresh_starts_anew(self, tmp_path):
        first = self.start(tmp_path)
        assert choose(Run(root=str(tmp_path)), "r", "d", fresh=True).directory.path != first.directory.path

    def test_exactly_the_given_folder_and_its_run(self, tmp_path):
        run = Run(dir=str(tmp_path / "mine"))
        first = choose(run, "r", "d")
        assert first.directory.path == tmp_path / "mine" and not first.continued
        first.directory.write_status(state="finished", digest="other")
        with pytest.raises(MachineError, match="in use"):
            choose(run, "r", "d")
        first.lock.release()
        assert choose(run, "r", "d").continued
        with pytest.raises(MachineError, match="--fresh"):
            choose(run, "r", "d", fresh=True)

    @pytest.mark.parametrize("target", ["../../etc", "/etc", ".", "gone"])
    def test_a_latest_that_is_no_run_of_ours_is_not_followed(self, tmp_path, target):
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "latest").symlink_to(target)
        choice = choose(Run(root=str(tmp_path)), "r", "d")
        assert not choice.continued and choice.directory.path.parent == tmp_path / "r"
        assert (tmp_path / "r" / "latest").resolve() == choice.directory.path.resolve()
