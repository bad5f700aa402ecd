"""``tools/install_apex.sh``: what it says where apex cannot be built, by a Python and a compiler that play along."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "install_apex.sh"
PYTHON = """#!/bin/sh
# Answers as an interpreter would, to the questions of the script.
case "$*" in
  *amp_C*) exit {apex} ;;
  *version.cuda*) echo "{cuda}" ;;
  *__version__*) echo 2.99 ;;
  *"pip show"*) exit {other} ;;
  *"pip install"*) echo "installed $*" >> "{folder}/log" ;;
  *"import torch"*) exit {torch} ;;
esac
"""
NVCC = "#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n"


@pytest.fixture
def run(tmp_path):
    def call(*arguments, nvcc="12.8", **answers):
        values = {"apex": 1, "cuda": "12.6", "other": 1, "torch": 0, "folder": tmp_path} | answers
        (tmp_path / "bin").mkdir(exist_ok=True)
        texts = {"python": PYTHON.format(**values), **({"nvcc": NVCC.format(release=nvcc)} if nvcc else {})}
        for name, text in texts.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        variables = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=variables, capture_output=True, text=True, timeout=30
        )
        return done.returncode, done.stdout + done.stderr

    return call


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({"torch": 1}, "python has no torch. Fix: install it first"),
        ({"cuda": ""}, "torch 2.99 is built without CUDA. Fix: install a torch that is built with CUDA"),
        ({"nvcc": ""}, "there is no CUDA compiler (nvcc). Fix: install the CUDA toolkit 12.6, and set CUDA_HOME"),
        (
            {"nvcc": "11.8"},
            "nvcc is CUDA 11.8, and torch 2.99 is built with CUDA 12.6. Fix: install the CUDA toolkit 12.6",
        ),
        ({"other": 0}, "a package called apex is installed, without NVIDIA's extensions. Fix: python -m pip uninstall"),
    ],
    ids=["no-torch", "no-cuda", "no-compiler", "other-cuda", "other-apex"],
)
def test_refusals_are_status_2_and_change_nothing(run, tmp_path, answers, text):
    status, out = run(**answers)
    assert status == 2 and f"error: {text}" in out and not (tmp_path / "log").exists()


def test_what_is_there_is_left_alone(run, tmp_path):
    status, out = run(apex=0, nvcc="")
    assert status == 0 and "NVIDIA's apex is there" in out and not (tmp_path / "log").exists()


def test_check_changes_nothing(run, tmp_path):
    status, out = run("--check")
    assert status == 0 and "apex can be built here: torch 2.99, CUDA 12.6, nvcc 12.8" in out
    assert not (tmp_path / "log").exists()


def test_this_interpreter():
    """The real one: here without CUDA, or with all that it takes, or refused with a reason."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "--check"],
        env={"PYTHON": sys.executable, "PATH": "/usr/local/cuda/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 2) and (done.returncode == 0) != ("error: " in done.stderr and "Fix: " in done.stderr)
