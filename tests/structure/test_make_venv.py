"""``tools/make_venv.py`` against a fake Python whose ``venv`` and ``pip`` record what they are asked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "make_venv.py"
CPU_REPORT = [("torch", "2.13.0+cpu"), ("sympy", "1.14.0"), ("nvidia-ml-py", "13.0")]
CUDA_REPORT = [
    ("torch", "2.13.0"),
    ("nvidia-cublas-cu12", "12.8"),
    ("triton", "3.7.1"),
    ("cuda-bindings", "13"),
]

FAKE = """#!{python}
import json, os, pathlib, shutil, sys
folder = pathlib.Path({folder!r})
arguments = sys.argv[1:]
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
if arguments[:1] == ["-c"]:
    print({location!r})
elif arguments[:2] == ["-m", "venv"]:
    target = pathlib.Path(arguments[2]) / "bin"
    target.mkdir(parents=True)
    shutil.copy(__file__, target / "python")
elif "--report" in arguments:
    print((folder / "report").read_text())
if (folder / "fail").exists() and (folder / "fail").read_text() in " ".join(arguments):
    sys.exit(1)
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_venv", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Machine:
    """A project folder and a PATH on which only fake Pythons exist."""

    def __init__(self, tmp_path: Path) -> None:
        self.tool = load()
        self.folder, self.project = tmp_path / "fake", tmp_path / "project"
        self.folder.mkdir()
        self.project.mkdir()
        (self.project / "pyproject.toml").write_text('dependencies = ["torch>=2.11,<2.14"]')
        self.python = self.add_python("python3.11")
        self.report(CPU_REPORT)

    def add_python(self, name: str, location: str | None = None) -> str:
        path = self.folder / name
        text = FAKE.format(
            python=sys.executable,
            folder=str(self.folder),
            location=str(path) if location is None else location,
        )
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def report(self, packages: list[tuple[str, str]]) -> None:
        entries = [{"metadata": {"name": name, "version": version}} for name, version in packages]
        (self.folder / "report").write_text(json.dumps({"install": entries}))

    def installs(self) -> list[list[str]]:
        """Arguments of every real ``pip install`` so far, without the constant ones."""
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        constant = {"-m", "pip", "install", "--quiet", "--disable-pip-version-check"}
        found = [call for call in calls if call[:3] == ["-m", "pip", "install"] and "--dry-run" not in call]
        return [[word for word in call if word not in constant] for call in found]

    @property
    def venv(self) -> Path:
        return self.project / ".venv"

    def make(self) -> bool:
        return self.tool.make(self.project, None)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setenv("PATH", str(made.folder))
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(made.tool, "has_gpu", lambda: False)
    return made


def test_without_gpu_a_cuda_free_resolution_is_one_install(machine: Machine) -> None:
    assert machine.make()
    assert machine.installs() == [["--editable", f"{machine.project}[dev]"]]


def test_without_gpu_torch_comes_first_from_the_cpu_index(machine: Machine) -> None:
    machine.report(CUDA_REPORT)
    machine.make()
    assert machine.installs() == [
        ["--index-url", "https://download.pytorch.org/whl/cpu", "torch>=2.11,<2.14"],
        ["--editable", f"{machine.project}[dev]"],
    ]


def test_the_cpu_index_can_be_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_INDEX", "https://mirror.example/cpu")
    machine.report(CUDA_REPORT)
    machine.make()
    assert machine.installs()[0][:2] == ["--index-url", "https://mirror.example/cpu"]


def test_an_unreachable_cpu_index_is_one_clear_error_and_cuda_is_not_installed(machine: Machine) -> None:
    machine.report(CUDA_REPORT)
    (machine.folder / "fail").write_text("--index-url")
    with pytest.raises(machine.tool.Unable, match="TORCH_INDEX=URL make venv"):
        machine.make()
    assert not [call for call in machine.installs() if "--editable" in call]


def test_with_gpu_nothing_is_asked_of_another_index(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.tool, "has_gpu", lambda: True)
    machine.report(CUDA_REPORT)
    machine.make()
    assert machine.installs() == [["--editable", f"{machine.project}[dev]"]]


@pytest.mark.parametrize("name", ["torch", "triton", "pytorch-triton", "nvidia-nccl-cu13", "cuda-toolkit"])
def test_packages_of_a_cuda_build_are_known(machine: Machine, name: str) -> None:
    entry = {"metadata": {"name": name, "version": "2.13.0+cu128"}}
    assert machine.tool.cuda_packages(json.dumps({"install": [entry]})) == [name]


def test_this_projects_real_torch_bound_is_found(machine: Machine) -> None:
    (machine.project / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    machine.report(CUDA_REPORT)
    machine.make()
    assert machine.installs()[0][2] == "torch>=2.11,<2.14"


def test_a_second_make_does_nothing(machine: Machine) -> None:
    assert machine.make()
    before = machine.installs()
    assert not machine.make()
    assert machine.installs() == before


def test_a_changed_pyproject_installs_into_the_same_environment(machine: Machine) -> None:
    machine.make()
    (machine.venv / "mine").touch()
    with (machine.project / "pyproject.toml").open("a") as file:
        file.write("\n# changed")
    assert machine.make()
    assert (machine.venv / "mine").exists() and len(machine.installs()) == 2


def test_a_killed_build_is_rebuilt_from_nothing(machine: Machine) -> None:
    (machine.folder / "fail").write_text("--editable")
    with pytest.raises(machine.tool.Unable):
        machine.make()
    (machine.venv / "half-unpacked").touch()
    (machine.folder / "fail").unlink()
    assert machine.make()
    assert not (machine.venv / "half-unpacked").exists() and not machine.make()


def test_an_environment_whose_python_is_gone_is_rebuilt(machine: Machine) -> None:
    machine.make()
    (machine.venv / "bin" / "python").unlink()
    assert machine.make()
    assert (machine.venv / "bin" / "python").exists()


def test_a_copied_tree_gets_its_own_environment(machine: Machine, tmp_path: Path) -> None:
    machine.make()
    (machine.venv / "old").touch()
    machine.project = machine.project.rename(tmp_path / "elsewhere")
    assert machine.make()
    assert not (machine.venv / "old").exists()


def test_an_environment_made_by_hand_is_kept(machine: Machine) -> None:
    subprocess.run([machine.python, "-m", "venv", str(machine.venv)], check=True)
    (machine.venv / "mine").touch()
    assert machine.make()
    assert (machine.venv / "mine").exists()


def test_python_311_is_preferred_and_broken_ones_are_passed_over(machine: Machine) -> None:
    newer = machine.add_python("python3.12")
    machine.add_python("python3.13", location="")  # runs, but is too old or lacks ensurepip
    assert machine.tool.find_python(None) == machine.python
    Path(machine.python).write_text("#!/bin/sh\nexit 127\n")  # a version manager's shim of a version not chosen
    assert machine.tool.find_python(None) == newer


def test_without_a_suited_python_the_message_says_what_to_do(machine: Machine) -> None:
    script = machine.project / "tools" / SCRIPT.name
    script.parent.mkdir()
    script.write_bytes(SCRIPT.read_bytes())
    command = [sys.executable, str(script), "--python", "python3.absent"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert "no Python 3.11 or newer" in done.stderr and "Traceback" not in done.stderr
    assert not machine.venv.exists()
