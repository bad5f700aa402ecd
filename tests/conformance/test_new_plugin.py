"""``camshaft new-plugin``: what it writes is installed, keeps its promises and trains, without an edit; each kind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from camshaft import scaffold
from camshaft.cli import run
from camshaft.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("observer", "reducer", "sharder", "schedule", "kernel", "optimizer")
ALONE = "observer"
"""The kind whose tests pytest finds in its folder by itself, and whose recipe the command trains. Neither pytest nor
the launcher knows anything of kinds: others' tests run in one process, their recipes in forked ranks of another.
"""
TRAIN = """
import os
import sys

from camshaft.recipe import load
from camshaft.testing.run import record_ranks

for folder in sys.argv[2:]:
    os.chdir(folder)
    kind = folder.rpartition("-")[2]
    places = [f"run.dir={sys.argv[1]}/run-{kind}", f"data.cache_dir={sys.argv[1]}/cache", "training.max_steps=3"]
    record_ranks(load("recipe.yaml", places, world_size=2), 2)
"""
RULES = ["--isolated", "--line-length=120", "--select=E,F,W,I,UP,B,RUF", "--ignore=RUF012"]


class Workshop:
    """Camshaft as its wheel has it, packages that its command wrote, and a folder that they are installed in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.site, self.camshaft = folder, folder / "site", folder / "camshaft"
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(self.camshaft)
        self.site.mkdir()
        shutil.copy(ROOT / "tests" / "forked.py", self.site)

        for kind in KINDS:
            words = ["-m", "camshaft", "new-plugin", f"our_{kind}", "--kind", kind, "--into", str(folder)]
            self.python(*words, path=[self.camshaft])
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-compile"]
        self.python(*install, "--target", str(self.site), *map(str, self.packages(KINDS)), path=[])
        self._said: dict[str, str] = {}

    def packages(self, kinds: Iterable[str]) -> list[Path]:
        return [self.folder / f"camshaft-our-{kind}" for kind in kinds]

    def conformance(self, kind: str) -> str:
        """What pytest said of the tests of a kind's package."""
        rules = ["-m", "pytest", "-v", "-p", "forked", "-p", "no:cacheprovider"]
        if kind == ALONE:
            return self.python(*rules, path=[self.site], cwd=self.packages([kind])[0])
        if not self._said:
            folders = self.packages(each for each in KINDS if each != ALONE)
            said = self.python(*rules, "--import-mode=importlib", *map(str, folders), path=[self.site])
            for each in KINDS:
                lines = [line for line in said.splitlines() if f"::TestOur{each.title()}::" in line]
                self._said[each] = "\n".join(lines)
        return self._said[kind]

    def trained(self, kind: str) -> dict[str, Any]:
        """The last record of a kind's recipe, trained for three steps."""
        run = self.folder / f"run-{kind}"
        if kind == ALONE:
            places = [f"run.dir={run}", f"data.cache_dir={self.folder / 'cache'}", "training.max_steps=3"]
            command = ["-m", "camshaft", "train", "recipe.yaml", *places]
            self.python(*command, path=[self.site], cwd=self.packages([kind])[0])
        elif not run.exists():
            folders = self.packages(each for each in KINDS if each != ALONE)
            self.python("-c", TRAIN, str(self.folder), *map(str, folders), path=[self.site])
        record: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        return record

    def python(self, *arguments: str, path: list[Path], cwd: Path | None = None) -> str:
        """Run Python and return what it said."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path))}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd or self.folder, env=environment, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def test_there_is_a_template_for_each_kind() -> None:
    assert tuple(scaffold.kinds()) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_its_conformance_tests_pass(workshop: Workshop, kind: str) -> None:
    said = workshop.conformance(kind)
    results = re.findall(r"::(test_\w+)(?:\[[\w-]+\])? ([A-Z]+) ", said)
    passed = {name for name, outcome in results if outcome == "PASSED"}
    assert len(passed) == {"observer": 9, "schedule": 11}.get(kind, 10), said
    # Two that claim the same are not in one recipe.
    assert {name for name, outcome in results if outcome != "PASSED"} <= {"test_equals_the_reference_beside_others"}, (
        said
    )


@pytest.mark.parametrize("kind", KINDS)
def test_its_recipe_trains_on_two_ranks(workshop: Workshop, kind: str) -> None:
    record = workshop.trained(kind)
    assert record["progress/global_step"] == 3 and record["train/loss"] > 0
    (folder,) = workshop.packages([kind])
    used = yaml.safe_load((folder / "recipe.yaml").read_text())["plugins"]
    assert f"our_{kind}" in used or used["pipeline"] == {"schedule": "our_schedule"}
    if kind == "observer":
        assert '"step": 3' in (workshop.folder / f"run-{kind}" / "our_observer.json").read_text()


def test_all_are_formatted_and_typed(tmp_path: Path) -> None:
    folders = [scaffold.write(scaffold.Request(f"our_{kind}", kind), tmp_path) for kind in KINDS]
    binaries, path = Path(sys.executable).parent, [ROOT / "engine", ROOT / "plugins", *folders]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(map(str, path))}
    for command in (
        [binaries / "ruff", "check", *RULES, "."],
        [binaries / "ruff", "format", "--isolated", "--line-length=120", "--check", "."],
        [binaries / "mypy", "--strict", *(word for kind in KINDS for word in ("-p", f"camshaft_our_{kind}"))],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_its_texts_are_filled_in(tmp_path: Path, kind: str) -> None:
    folder = scaffold.write(scaffold.Request(f"our_{kind}", kind), tmp_path)
    texts = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert len(texts) >= 9 and not any("@@" in text for text in texts), "a place that was not filled"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == f"camshaft-our-{kind}" and len(project["entry-points"]) == 1
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    workflow = yaml.safe_load((folder / ".github" / "workflows" / "test.yml").read_text())
    assert {"run": "pytest"} in workflow["jobs"]["test"]["steps"]


def test_what_exists_is_never_touched(tmp_path: Path) -> None:
    folder = scaffold.write(scaffold.Request("mine", "observer", "mit"), tmp_path)
    assert "MIT License" in (folder / "LICENSE").read_text()
    kept = folder / "camshaft_mine" / "__init__.py"
    kept.write_text("# edited\n")
    with pytest.raises(RecipeError, match="exists already, and nothing is overwritten"):
        scaffold.write(scaffold.Request("mine", "reducer"), tmp_path)
    assert kept.read_text() == "# edited\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Best-Loss", "take lower-case letters, digits and single underscores between them, for example 'best_loss'"),
        ("Best--Loss2_", "for example 'best_loss2'"),
        ("mine_", "no name of a plugin.*for example 'mine'"),
        ("a" * 65, "65 characters is too long: take 64 at most"),
        ("2fast", "no name of a plugin"),
        ("../up", "no name of a plugin"),
        ("é", "no name of a plugin"),
        ("lambda", "a word of Python's own"),
        ("match", "a word of Python's own"),
        ("zero", "a plugin called 'zero' is installed already"),
    ],
)
def test_names_that_cannot_be_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        scaffold.write(scaffold.Request(name, "observer"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_that_recipes_know_already_are_refused(tmp_path: Path) -> None:
    """A package called so would never be asked: the shipped one is."""
    from camshaft_kernels.registry import AUTO, PROVIDERS
    from camshaft_pipeline.options import Options

    (names, _) = get_args(Options.model_fields["schedule"].annotation)
    assert scaffold.taken("schedule") == set(get_args(names))
    assert scaffold.taken("kernel") == {*PROVIDERS, AUTO}
    for name, kind in (("gpipe", "schedule"), ("triton", "kernel")):
        with pytest.raises(RecipeError, match=f"names another {kind} in a recipe already"):
            scaffold.write(scaffold.Request(name, kind), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert scaffold.write(scaffold.Request("gpipe", "observer"), tmp_path).is_dir()


def test_the_command_says_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["new-plugin", "mine", "--kind", "observer", "--into", str(tmp_path)]) == 0
    assert f"pytest {tmp_path / 'camshaft-mine'}" in capsys.readouterr().out
    assert run(["new-plugin", "mine", "--kind", "tracker", "--into", str(tmp_path)]) == 2
    assert "there is no kind 'tracker': use one of observer, reducer" in capsys.readouterr().err
    assert run(["new-plugin", "mine", "--kind", "observer", "--into", str(tmp_path / "a b")]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [shlex.split(line)[-1] for line in lines] == [
        *[str(tmp_path / "a b" / "camshaft-mine")] * 2,
        str(tmp_path / "a b" / "camshaft-mine" / "recipe.yaml"),
    ]
