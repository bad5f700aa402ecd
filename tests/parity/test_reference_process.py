"""Beside a GPU the plain process is a fork, so that ranks can still be forked from the one that asked for it."""

import os
import subprocess
import sys

import pytest
import torch

from camshaft.data import prepare
from camshaft.testing.compare import assert_bit_equal
from camshaft.testing.ranks import RankFailed
from camshaft.testing.reference import plain_run


def build(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def test_numbers_are_the_same_in_a_fork(make_recipe, monkeypatch):
    resolved = make_recipe({"adamw": {"lr": 1e-3}}, training={"max_tokens": 32 * 24, "log_every": 1})
    data, places = prepare(resolved), []

    def run():
        return plain_run(
            resolved, data, build, compute="fp64", max_norm=0.1, prepare=lambda model: places.append(os.getpid())
        )

    asked = torch.cuda.is_available()
    here = run()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert_bit_equal(here, run())
    assert places == ([] if asked else [os.getpid()]), "the second run was elsewhere"


def test_what_fails_in_the_fork_is_told(make_recipe, monkeypatch):
    resolved = make_recipe({"adamw": {"lr": 1e-3}})

    def refuse(model):
        raise ValueError("no optimizer today")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RankFailed, match="no optimizer today"):
        plain_run(resolved, prepare(resolved), refuse, compute="fp64", max_norm=None)


def test_asking_for_gpus_starts_no_cuda():
    """In a process that has imported nothing of ours before; what its user has set stays."""
    line = "import os, camshaft.testing.ranks; print(os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'])"
    for given, wanted in ((None, "1"), ("0", "0")):
        environ = {name: value for name, value in os.environ.items() if name != "PYTORCH_NVML_BASED_CUDA_CHECK"}
        environ |= {} if given is None else {"PYTORCH_NVML_BASED_CUDA_CHECK": given}
        done = subprocess.run([sys.executable, "-c", line], env=environ, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted
