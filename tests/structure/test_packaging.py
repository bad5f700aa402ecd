"""What is shipped: the wheel, the sdist, the commands of Makefile and CI, the pre-commit hooks."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    path.relative_to(ROOT / top).as_posix()
    for top in ("engine", "plugins")
    for path in (ROOT / top).rglob("*")
    if path.suffix in (".py", ".in", ".yaml", ".json") or path.name == "py.typed"
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel")))


def build(target: str, folder: Path) -> Path:
    """Build with hatchling, offline; the tree is not written to."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


def test_the_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == SOURCES
    assert {name.split("/")[0] for name in held}.isdisjoint({"engine", "plugins", "tests", "tools"})


def test_the_wheel_offers_every_plugin_and_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    offered = configparser.ConfigParser()
    offered.read_string(wheel.read(name).decode())
    assert dict(offered["console_scripts"]) == {"camshaft": "camshaft.cli:main"}
    assert set(offered["camshaft.plugins"]) == {
        path.parent.name.removeprefix("camshaft_") for path in (ROOT / "plugins").glob("*/__init__.py")
    }


def test_the_wheel_works_from_an_empty_folder(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    program = "import camshaft, camshaft_ddp, sys; print(camshaft.__file__); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path))


def test_the_sdist_can_build_and_test_itself(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames()}
    wanted = {
        "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", ".ci/run", "tools/make_venv.py",
        "recipes/quickstart.yaml", "docs/hooks.md", "tests/structure/test_packaging.py", "engine/camshaft/py.typed",
    }  # fmt: skip
    assert wanted <= held
    assert not {name for name in held if name.startswith((".venv", "runs/", "wandb/"))}


TARGETS = {
    "quickstart": "camshaft train recipes/quickstart.yaml",
    "test": "-m pytest",
    "lint": "lint-imports",
    "types": "mypy",
    "bench": "-m tools.bench",
    "docs": "-m tools.docs",
    "venv": "make_venv.py",
}


def dry_run(*arguments: str) -> list[str]:
    """Commands that make would run. What an outer make passes down to this process is left out."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    command = ["make", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("target", TARGETS)
def test_make_builds_the_environment_first(target: str) -> None:
    commands = dry_run(target)
    assert "tools/make_venv.py" in commands[0]
    assert TARGETS[target] in commands[-1]


def test_make_test_runs_every_gate() -> None:
    commands = "\n".join(dry_run("test"))
    for gate in ("ruff check", "ruff format --check", "lint-imports", "changelog.py check", "mypy", "pytest"):
        assert gate in commands


def test_the_python_can_be_named() -> None:
    assert dry_run("venv", "PYTHON=python3.12") == ["python3.12 tools/make_venv.py --python python3.12"]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("make test", "make quickstart"):
        assert command in readme and re.search(rf"^{command}\b", script, re.MULTILINE)


def test_pre_commit_hooks_are_local_and_use_tools_that_exist() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    for hook in config["repos"][0]["hooks"]:
        program = hook["entry"].split()[0]
        assert hook["language"] == "system"
        if program.startswith(".venv/bin/"):
            assert (Path(sys.executable).parent / Path(program).name).exists(), hook["id"]
        else:
            assert hook["entry"].split()[1] in TARGETS


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "camshaft", "validate", str(recipe)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
