"""Build the project's own environment in ``.venv``: ``python3 tools/make_venv.py [--python EXECUTABLE]``.

Needs nothing but a Python (3.7 or newer runs this file; the environment gets 3.11 or newer). Does nothing
when the environment is up to date, so that ``make test`` may call it every time. On a machine without an
NVIDIA GPU no CUDA packages are installed. Exit status 3 when the machine cannot do it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITED = ("python3.11", "python3.12", "python3.13")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE = "import sys, ensurepip, venv; print(sys.executable if sys.version_info >= (3, 11) else '')"


class Unable(Exception):
    """The machine cannot build the environment; the message says what to do."""


def find_python(wanted: str | None) -> str:
    """Full path of a Python >= 3.11 that can make environments: ``wanted``, or the first suited one."""
    candidates = [wanted] if wanted else [*SUITED, sys.executable, "python3", "python"]
    for candidate in candidates:
        try:
            probe = subprocess.run([candidate, "-c", PROBE], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if probe.returncode == 0 and probe.stdout.strip():
            return probe.stdout.strip()
    raise Unable(
        f"no Python 3.11 or newer with the modules venv and ensurepip found (tried {', '.join(candidates)}). "
        "Install one (on Debian: python3.11 and python3.11-venv), or name it: make venv PYTHON=python3.11"
    )


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is there: its device file, or an nvidia-smi that lists one."""
    if Path("/dev/nvidia0").exists():
        return True
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def cuda_packages(report: str) -> list[str]:
    """Names in pip's JSON report that belong to a CUDA build of torch."""
    found = []
    for item in json.loads(report)["install"]:
        name, version = item["metadata"]["name"].lower(), item["metadata"]["version"]
        cuda = re.match(r"(nvidia-(?!ml-py)|cuda-|(pytorch-)?triton)", name)
        if cuda or (name == "torch" and "+cu" in version):
            found.append(name)
    return found


def run(command: list[str], **options: object) -> str:
    """Run a command and return what it wrote to stdout, if that is captured."""
    done = subprocess.run(command, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise Unable(f"this command failed with status {done.returncode}: {' '.join(command)}")
    return str(done.stdout or "")


def install(python: str, project: Path) -> None:
    """Install the project and its tools; torch's bound is part of the same resolution."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not has_gpu():
        torch = re.search(r'"(torch[<>=!~ ][^"]*)"', (project / "pyproject.toml").read_text(encoding="utf-8"))
        if torch is None:
            raise Unable("pyproject.toml names no torch")
        report = run([*pip, "--dry-run", "--report", "-", torch[1]], stdout=subprocess.PIPE)
        unwanted = cuda_packages(report)
        if unwanted:
            index = os.environ.get("TORCH_INDEX", CPU_INDEX)
            print(f"no NVIDIA GPU: torch comes from {index}, no CUDA ({len(unwanted)} packages)", flush=True)
            try:
                run([*pip, "--index-url", index, torch[1]])
            except Unable as error:
                hint = "name another index of torch's CPU builds: TORCH_INDEX=URL make venv"
                raise Unable(f"{error}; {hint}") from error
    run([*pip, "--editable", f"{project}[dev]"])


def usable(environment: Path, marker: Path) -> bool:
    """Whether an existing environment can be kept: finished, made here, and its Python still runs."""
    stamp = environment / "camshaft-stamp"
    if marker.exists() or (stamp.exists() and stamp.read_text().splitlines()[1:] != [str(environment)]):
        return False
    python = str(environment / "bin/python")
    try:
        return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def make(project: Path, wanted: str | None) -> bool:
    """Bring ``project/.venv`` up to date and say whether there was anything to do."""
    environment = project / ".venv"
    stamp, marker = environment / "camshaft-stamp", environment / "camshaft-unfinished"
    pyproject = (project / "pyproject.toml").read_bytes()
    fresh = f"{hashlib.sha256(pyproject).hexdigest()}\n{environment}\n"
    keep = usable(environment, marker)
    if keep and stamp.exists() and stamp.read_text() == fresh:
        return False
    if not keep:
        python = find_python(wanted)
        print(f"building {environment.name} with {python}; this takes a minute or two", flush=True)
        shutil.rmtree(environment, ignore_errors=True)
        environment.mkdir()
        marker.touch()  # a run that is killed from here on leaves it behind, and the next one starts over
        run([python, "-m", "venv", str(environment)])
    marker.touch()
    install(str(environment / "bin/python"), project)
    stamp.write_text(fresh)
    marker.unlink()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--python", help="make the environment with this Python")
    arguments = parser.parse_args()
    with (ROOT / "pyproject.toml").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two makes at once the second waits, then has nothing to do
        try:
            make(ROOT, arguments.python)
        except Unable as error:
            print(f"camshaft: {error}", file=sys.stderr)
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
