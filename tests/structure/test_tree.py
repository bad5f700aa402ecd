"""The shape of the tree: names that must agree, and how large things may grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from camshaft import Plugin

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "engine" / "camshaft"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py")}
NAMES = sorted(folder.removeprefix("camshaft_") for folder in FOLDERS)
CODE = [path for top in ("engine", "plugins", "tools", "tests") for path in sorted((ROOT / top).rglob("*.py"))]


def test_folders_and_entry_points_are_the_same_plugins() -> None:
    declared = PYPROJECT["project"]["entry-points"]["camshaft.plugins"]
    assert declared == {name: f"camshaft_{name}:Plugin" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_plugin_loads_and_is_its_own(name: str) -> None:
    (point,) = entry_points(group="camshaft.plugins", name=name)
    plugin = point.load()
    assert issubclass(plugin, Plugin) and plugin.__module__.split(".")[0] == f"camshaft_{name}"


def test_import_contracts_cover_every_plugin() -> None:
    linter = PYPROJECT["tool"]["importlinter"]
    forbidden, _, independent = linter["contracts"]
    assert set(linter["root_packages"]) == FOLDERS | {"camshaft"}
    assert set(forbidden["forbidden_modules"]) == FOLDERS | {"deepspeed", "wandb"}
    assert set(independent["modules"]) == FOLDERS


def test_each_part_of_the_core_runs_a_step_or_is_a_tool() -> None:
    contract = PYPROJECT["tool"]["importlinter"]["contracts"][1]
    core, tools = set(contract["source_modules"]), set(contract["forbidden_modules"])
    found = {
        f"camshaft.{path.stem}"
        for path in (ROOT / "engine" / "camshaft").iterdir()
        if path.name[0] not in "_." and path.name != "py.typed"
    }
    assert core | tools == found
    assert not core & tools


def test_every_plugin_is_documented() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    reference = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`(\w+)`\]\(docs/recipe\.md#plugins\w+\)", readme, re.MULTILINE) == NAMES
    assert re.findall(r"^### plugins\.(\w+)$", reference, re.MULTILINE) == NAMES


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


# A core far above 2,000 lines is a sign that a strategy leaked in. What surrounds it has budgets of its own.
AREAS = {
    "recipe": ("recipe/", 2150),
    "machine": (("environment.py", "processes.py", "distributed.py", "rundir.py", "host_memory.py"), 1050),
    "planning": (
        ("claims.py", "estimate.py", "activations.py", "peak.py", "mesh.py", "effects.py", "holding.py"),
        1150,
    ),
    "data movement": (
        ("parts.py", "boxes.py", "blocks.py", "masters.py", "comm.py", "comm_exchange.py", "exchange.py", "sums.py"),
        1250,
    ),
    "operations": (("ops.py",), 250),
    "finder": (("finder.py", "trial.py", "halving.py"), 360),
    "proofs": (("verify/", "contracts.py"), 2320),
    "measuring": (("profiling/", "datasheet.py", "meter.py"), 1800),
    "sweep": ("sweep/", 850),
    "extension": (("schedules.py", "deprecations.py"), 150),
    "core": ("", 2260),
}
APART = ("models/", "data/", "testing/", "cli/", "scaffold/")


def test_the_core_stays_small() -> None:
    sizes: dict[str, dict[str, int]] = {area: {} for area in AREAS}
    for path in sorted(CORE.rglob("*.py")):
        name = path.relative_to(CORE).as_posix()
        if not name.startswith(APART):
            area = next(area for area, (prefix, _) in AREAS.items() if name.startswith(prefix))
            sizes[area][name] = lines(path)
    too_long = {
        area: (sum(found.values()), found) for area, found in sizes.items() if sum(found.values()) > AREAS[area][1]
    }
    assert too_long == {}, "something in it belongs to a plugin"


def test_no_file_is_too_long() -> None:
    assert {str(path.relative_to(ROOT)): lines(path) for path in CODE if lines(path) > 400} == {}


TEXT = (".py", ".md", ".yaml", ".yml", ".toml", ".svg")
TOP_LEVEL = ("engine", "plugins", "tools", "tests", "docs", "recipes", "changelog.d")
MACHINE_PATH = re.compile(r"(?<![a-z.\w])/(root|home|work|tmp|Users)/[A-Za-z]")


def test_no_path_of_a_machine_is_written_down() -> None:
    files = [path for top in TOP_LEVEL for path in (ROOT / top).rglob("*") if path.suffix in TEXT]
    files += [path for path in ROOT.iterdir() if path.is_file()] + [ROOT / ".ci" / "run"]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_a_plugin_is_typed_and_says_what_it_is(path: Path) -> None:
    assert (path.parent / "py.typed").exists()
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert len(text.split()) >= 8, f"{path}: the docstring names the method, its source and what it claims"


def test_each_part_of_the_core_can_be_imported_first() -> None:
    """A circle of imports shows from some entrances alone."""
    names = sorted(
        ".".join(path.relative_to(CORE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in [
            *CORE.glob("*.py"),
            *CORE.glob("*/__init__.py"),
            *CORE.glob("recipe/*.py"),
            *CORE.glob("models/*.py"),
        ]
        if path.name != "__main__.py"
    )
    program = (
        "import importlib, os, sys, torch\n"
        "for name in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except ImportError as error:\n"
        "            print(f'{name}: {error}', flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and len(names) > 40, done.stderr
    assert done.stdout == ""
