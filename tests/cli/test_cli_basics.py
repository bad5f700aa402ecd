"""The command line itself: help, usage, exit statuses, launcher arguments, what gets imported, and how fast."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from camshaft import __version__, cli, host
from camshaft.cli import COMMANDS, run, without_local_rank
from camshaft.errors import CamshaftError, MachineError, NonFiniteLoss, Problem, RecipeError

RECIPE = """\
schema_version: 1
name: small
model: {preset: llama-tiny}
tokenizer: {type: byte}
data:
  sequence_length: 64
batch: {micro_batch_size: 2, global_batch_size: 8}
training: {max_steps: 5}
launch: {processes: 2}
plugins:
  ddp: {}
  adamw: {lr: 1e-3}
"""
HEAVY = ("torch", "deepspeed", "wandb", "tokenizers", "rich")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Replaces the commands by one, ``probe``, that calls a function."""

    def install(call: Callable[[], None]) -> None:
        module = types.ModuleType("camshaft.cli.probe")
        module.register = lambda app: app.command("probe")(call)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "camshaft.cli.probe", module)
        monkeypatch.setitem(COMMANDS, "probe", "Probe.")

    return install


def raising(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


class TestHelp:
    def test_lists_every_command_and_imports_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["--help"]) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {name} " in out for name in COMMANDS)

    @pytest.mark.parametrize("name", sorted(COMMANDS))
    def test_every_command_has_help(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run([name, "--help"]) == 0
        assert f"Usage: camshaft {name}" in capsys.readouterr().out

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["--version"]) == 0
        assert capsys.readouterr().out == f"camshaft {__version__}\n"

    def test_a_command_that_cannot_be_imported_breaks_no_other(
        self, monkeypatch: pytest.MonkeyPatch, recipe: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(COMMANDS, "absent", "Not there.")
        assert run(["--help"]) == 0
        assert "absent" in capsys.readouterr().out
        assert run(["validate", recipe]) == 0


class TestUsage:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["nonsense"], "nonsense"),
            (["validate"], "RECIPE"),
            (["validate", "x.yaml", "--nonsense"], "--nonsense"),
            (["validate", "x.yaml", "--world-size", "0"], "world-size"),
            (["validate", "x.yaml", "--world-size", "two"], "world-size"),
            (["--nonsense"], "--nonsense"),
            (["plugins", "extra"], "extra"),
        ],
    )
    def test_bad_usage_is_2(self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err

    def test_nothing_at_all_shows_the_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run([]) == 2
        assert "validate" in "".join(capsys.readouterr())


class TestStatus:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (RecipeError("x"), 2),
            (MachineError("x"), 3),
            (NonFiniteLoss("x"), 5),
            (CamshaftError("x"), 1),
            (KeyboardInterrupt(), 130),
            (typer.Exit(7), 7),
            (typer.Exit(), 0),
            (typer.Abort(), 130),
        ],
    )
    def test_errors_have_their_status(
        self, command: Callable[[Callable[[], None]], None], error: BaseException, status: int
    ) -> None:
        command(raising(error))
        assert run(["probe"]) == status

    def test_each_problem_is_one_line(
        self, command: Callable[[Callable[[], None]], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        problems = [Problem("bad", key="a.b", file="r.yaml", line=3, fix="mend it"), Problem("worse")]
        command(raising(RecipeError(problems)))
        assert run(["probe"]) == 2
        assert capsys.readouterr() == ("", "error: r.yaml:3: a.b: bad. Fix: mend it\nerror: worse\n")

    def test_bugs_keep_their_traceback(self, command: Callable[[Callable[[], None]], None]) -> None:
        command(raising(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            run(["probe"])

    def test_main_exits(self) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(["nonsense"])
        assert caught.value.code == 2

    def test_python_m_is_the_same(self, recipe: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "camshaft", "validate", recipe, "seed=x"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: override 1 (seed): seed: must be a whole number")

    def test_a_closed_pipe_is_silent(self, recipe: str) -> None:
        reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
        reader.wait()
        assert reader.stdin is not None
        done = subprocess.run(
            [sys.executable, "-m", "camshaft", "explain", recipe],
            stdout=reader.stdin, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
        reader.stdin.close()
        assert (done.returncode, done.stderr) == (1, "")


class TestLocalRank:
    @pytest.mark.parametrize(
        "argv",
        [
            ["--local_rank=3", "validate", "r.yaml"],
            ["--local-rank=3", "validate", "r.yaml"],
            ["--local_rank", "3", "validate", "r.yaml"],
            ["validate", "--local_rank=0", "r.yaml"],
            ["validate", "r.yaml", "--local-rank", "0"],
            ["validate", "r.yaml", "--local_rank"],
        ],
    )
    def test_is_removed_wherever_it_is(self, argv: list[str]) -> None:
        assert without_local_rank(argv) == ["validate", "r.yaml"]

    def test_similar_words_stay(self) -> None:
        argv = ["validate", "--local_ranks=3", "a.local_rank=3", "local_rank"]
        assert without_local_rank(argv) == argv

    def test_whole_command(self, recipe: str) -> None:
        assert run(["--local_rank=1", "validate", recipe, "--local_rank", "1"]) == 0


class TestExplain:
    def test_whole_table(self, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["explain", recipe, "seed=3", "plugins.clip={max_norm: 2}"]) == 0
        rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
        assert rows["KEY"] == ["VALUE", "SET BY"]
        assert rows["name"] == ["small", f"{recipe}:2"]
        assert rows["seed"] == ["3", "override 1 (seed)"]
        assert rows["training.log_every"] == ["10", "default of the schema"]
        assert rows["plugins.adamw.lr"] == ["0.001", f"{recipe}:12"]
        assert rows["plugins.adamw.eps"][1] == "default of plugin 'adamw'"
        assert rows["batch.gradient_accumulation_steps"] == ["2", "derived: 8 / (2 x 2)"]
        assert rows["plugins.clip.max_norm"] == ["2.0", "override 2 (plugins.clip)"]

    def test_fields_of_the_preset(self, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["explain", recipe, "model", "model.preset=llama-3.1-8b", "model.num_hidden_layers=3"]) == 0
        rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
        assert rows["model.hidden_size"].split(maxsplit=1) == ["4096", "preset 'llama-3.1-8b'"]
        assert rows["model.num_hidden_layers"].split(maxsplit=1) == ["3", "override 2 (model.num_hidden_layers)"]
        assert rows["model.head_dim"].split(maxsplit=1) == ["128", "derived, or default of the architecture"]
        assert rows["model.rope_scaling"].startswith("{rope_type: llama3, factor: 8.0")
        assert run(["explain", recipe, "model.hidden_size", "model.num_attention_heads=7"]) == 0
        assert "null" in capsys.readouterr().out  # a model with a fault has no sizes; validate names it

    def test_one_key_and_a_section(self, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["explain", recipe, "batch", "name"]) == 0
        keys = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        batch = ["micro_batch_size", "global_batch_size", "gradient_accumulation_steps", "on_out_of_memory"]
        assert keys == ["KEY", *(f"batch.{key}" for key in batch), "name"]

    @pytest.mark.parametrize(
        ("key", "meant"),
        [("training.max_setps", "training.max_steps"), ("max_steps", "training.max_steps"), ("bacth", "batch")],
    )
    def test_unknown_key(self, recipe: str, capsys: pytest.CaptureFixture[str], key: str, meant: str) -> None:
        assert run(["explain", recipe, key]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert f"no key '{key}'. Did you mean '{meant}'?" in err

    def test_world_size_decides_what_is_derived(self, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["explain", recipe, "parallel.data_parallel", "--world-size", "4"]) == 0
        assert "4      derived from 4 process(es)" in capsys.readouterr().out


class TestPlugins:
    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["plugins"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == list(host.installed())
        assert all(f"camshaft {__version__}" in line for line in lines[1:])

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["plugins", "--json"]) == 0
        found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
        assert set(found) == set(host.installed())
        assert found["adamw"]["distribution"] == f"camshaft {__version__}"
        assert "AdamW" in found["adamw"]["about"]

    def test_a_plugin_that_cannot_be_imported_hides_no_other(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from importlib.metadata import EntryPoint

        points = {**host.installed(), "broken": EntryPoint("broken", "no_such_module_here:Plugin", host.GROUP)}
        monkeypatch.setattr(host, "installed", lambda: points)
        assert run(["plugins"]) == 0
        out = capsys.readouterr().out
        assert "cannot be loaded: plugin 'broken'" in out
        assert "\nadamw " in out


def modules_after(*argv: str) -> tuple[int, set[str]]:
    """Exit status of a command in a fresh interpreter, and which heavy modules it imported."""
    code = (
        "import sys\nfrom camshaft.cli import run\n"
        f"status = run({list(argv)!r})\n"
        f"print('\\n@', status, *({set(HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "@", done.stderr
    return int(last[1]), set(last[2:])


class TestCost:
    @pytest.mark.parametrize(
        "argv",
        [["--help"], ["validate"], ["plan"], ["explain"], ["plugins"], ["plugins", "--json"], ["schema"], ["hooks"]],
        ids=" ".join,
    )
    def test_nothing_heavy_is_imported(self, recipe: str, argv: list[str]) -> None:
        words = [*argv, recipe] if argv[0] in ("validate", "plan", "explain", "hooks") else argv
        assert modules_after(*words) == (0, set())

    @pytest.mark.parametrize(("override", "status"), [("seed=1", 0), ("seed=x", 2)], ids=["valid", "broken"])
    def test_validate_takes_less_than_a_second(self, recipe: str, override: str, status: int) -> None:
        """Processor time, 0.3 s where it was measured: other work on the machine does not count."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        argv = [sys.executable, "-m", "camshaft", "validate", recipe, override]
        assert subprocess.run(argv, capture_output=True, timeout=60).returncode == status
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
