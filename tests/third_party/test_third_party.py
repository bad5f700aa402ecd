"""Three packages of strangers, built as wheels, in a fresh environment: they train from a recipe and keep the promises.

A reducer that sends few entries of gradients, a pipeline schedule, an observer with state. Nothing of Camshaft knows
them, and nothing of it is changed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = ("topk", "eager", "ema")
BY_COMMAND = ("ema",)
"""Packages that the command continues too; others go on in forked ranks, which start in a tenth of its time."""
WATCHED = {"topk": ["plugins.ledger={}"]}
"""What stands beside a package in its whole run, and not where it goes on."""
GO_ON = """
import sys

from camshaft.recipe import load
from camshaft.testing.run import record_ranks

for stop in (8, 12):
    record_ranks(load(sys.argv[1], [*sys.argv[2:], f"training.max_steps={stop}"], world_size=2), 2)
"""


class Fresh:
    """An environment of its own, in which the packages are and what this one has can be seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.python = folder / "venv" / "bin" / "python"
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        (site / "beside.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        launcher = self.python.with_name("deepspeed")  # as an installation of it here would make
        launcher.write_text(f"#!{self.python}\nfrom deepspeed.launcher.runner import main\n\nmain()\n")
        launcher.chmod(0o755)
        pip = [sys.executable, "-m", "pip"]
        offline = ["--quiet", "--no-deps", "--no-index"]
        sources = [str(HERE / package) for package in PACKAGES]
        build = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(folder), *sources]
        subprocess.run(build, check=True)
        self.wheels = {path.name.split("-")[0].removeprefix("camshaft_"): path for path in folder.glob("*.whl")}
        install = [*pip, "--python", str(self.python), "install", "--no-compile", *offline]
        subprocess.run([*install, *map(str, self.wheels.values())], check=True)
        shutil.copy(ROOT / "tests" / "forked.py", folder)
        self._whole: dict[str, list[dict[str, float]]] = {}
        self._said = ""

    def run(self, *arguments: str, timeout_s: float = 280) -> str:
        """Run Python in it, outside of every source tree, and return what it said."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder,
            env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def conformance(self) -> str:
        """What pytest said of the tests of all packages."""
        if not self._said:
            tests = [str(HERE / package / f"conformance_of_{package}.py") for package in PACKAGES]
            rules = ["-p", "forked", "-p", "no:cacheprovider", "-W", "error", "--rootdir", str(self.folder)]
            self._said = self.run("-m", "pytest", "-v", "--tb=short", *rules, "-c", os.devnull, *tests)
        return self._said

    def train(self, package: str, name: str, *overrides: str) -> list[dict[str, float]]:
        """Train the package's recipe under its launcher; returns the records of training."""
        self.run("-m", "camshaft", "train", *self._places(package, name), *overrides)
        return self.records(name)

    def train_forked(self, package: str, name: str) -> list[dict[str, float]]:
        """Train 8 steps, and in other processes to the end."""
        self.run("-c", GO_ON, *self._places(package, name))
        return self.records(name)

    def whole(self, package: str) -> list[dict[str, float]]:
        """Records of the package's recipe trained to its end; made once."""
        if package not in self._whole:
            self._whole[package] = self.train(package, f"{package}-whole", *WATCHED.get(package, ()))
        return self._whole[package]

    def records(self, name: str) -> list[dict[str, float]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "train/loss" in record]

    def _places(self, package: str, name: str) -> list[str]:
        run, cache = f"run.dir={self.folder / name}", f"data.cache_dir={self.folder / 'cache'}"
        return [str(HERE / package / "recipe.yaml"), run, cache, "launch.threads_per_rank=1"]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("fresh"))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_brings_files_of_its_own_alone(fresh: Fresh, package: str) -> None:
    names = zipfile.ZipFile(fresh.wheels[package]).namelist()
    assert names and all(name.startswith(f"camshaft_{package}") for name in names)
    where = fresh.run(
        "-c", f"import camshaft, camshaft_{package} as own; print(own.__file__); print(camshaft.__file__)"
    )
    own, core = where.split()
    assert own.startswith(str(fresh.folder)) and core == str(ROOT / "engine" / "camshaft" / "__init__.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_it_keeps_the_promises_of_every_plugin(fresh: Fresh, package: str) -> None:
    said = fresh.conformance()
    assert len(re.findall(rf"::Test{package.title()}\w*::\S+ PASSED", said)) >= 11, said


@pytest.mark.parametrize("package", PACKAGES)
def test_it_trains_from_a_recipe_on_two_ranks_and_goes_on(fresh: Fresh, package: str) -> None:
    whole = fresh.whole(package)
    assert whole[-1]["train/loss"] < whole[0]["train/loss"] - 0.05
    if package in BY_COMMAND:
        fresh.train(package, f"{package}-halves", "training.max_steps=8")
        halves = fresh.train(package, f"{package}-halves")
    else:
        halves = fresh.train_forked(package, f"{package}-halves")
    assert [record["progress/global_step"] for record in halves] == [2, 4, 6, 8, 10, 12]
    same = ("train/loss", "train/grad_norm", "progress/global_step")
    assert [[r[key] for key in same] for r in halves] == [[r[key] for key in same] for r in whole]


def test_the_mean_is_in_the_checkpoint(fresh: Fresh) -> None:
    """Another program reads it there, by the parameter's name."""
    fresh.whole("ema")
    files = sorted((fresh.folder / "ema-whole" / "checkpoints" / "step_00000004").glob("*.safetensors"))
    program = (
        "import sys; from safetensors import safe_open\n"
        "print(*{name.partition('@')[0] for path in sys.argv[1:] for name in safe_open(path, 'pt').keys()})"
    )
    names = fresh.run("-c", program, *map(str, files)).split()
    assert "optimizer.model.norm.weight.ema.weights" in names


def test_few_entries_are_few_bytes(fresh: Fresh) -> None:
    """By the run's own ledger: a rank sends its entries and a flag a parameter, in fp32, and indexes of 8 bytes."""
    records = fresh.whole("topk")
    sizes = parameter_sizes(fresh.folder / "topk-whole" / "resolved.yaml")
    chosen = sum(math.ceil(0.05 * size) for size in sizes)
    sent = records[-1]["plugin/ledger/topk/dp/all_gather/bytes_per_step"]
    assert sent == 4 * (chosen + len(sizes)) + 8 * chosen
    assert sent < 0.2 * 4 * sum(sizes), "a dense sum sends 4 bytes an entry"


def parameter_sizes(recipe: Path) -> list[int]:
    """Elements of each parameter of a recipe's model."""
    import torch

    from camshaft.models.llama import Llama
    from camshaft.recipe import check, load

    tree = yaml.safe_load(recipe.read_text())
    del tree["plugins"]["topk"]  # not installed here
    plain = recipe.with_name("plain.yaml")
    plain.write_text(yaml.safe_dump(tree))
    config = check(load(plain), 1).config
    with torch.device("meta"):
        return [parameter.numel() for parameter in Llama(config).parameters()]
