"""Floating dtypes follow the precision of now; what is rounded is told, and nothing else is converted."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from checkpoint_flat import FlatRun, everything_whole
from checkpoint_toy import Run, Toy, differences, everything
from torch import nn

from camshaft.errors import CheckpointError


class Other(Toy):
    """One parameter is narrower than in ``Toy``, another wider."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.wide = nn.Parameter(self.wide.detach().float())
        self.low = nn.Parameter(self.low.detach().float())


def test_parameters_and_their_state_take_the_dtype_of_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = Run(tmp_path)
    first.train(3)
    second = Run(tmp_path, model=Other(seed=9))
    assert second.load()
    saved, got = everything(first.state), everything(second.state)
    keys = [f"{name}{suffix}" for name in ("wide", "low") for suffix in ("", "/exp_avg", "/exp_avg_sq")]
    assert differences(saved, got) == sorted(keys)
    for key in keys:
        assert torch.equal(saved[key].float(), got[key])
        assert got[key].dtype == torch.float32
    assert "3 tensor(s) in torch.float64, which were rounded to torch.float32" in caplog.text
    assert "3 tensor(s) in torch.bfloat16; they are torch.float32 now, unchanged" in caplog.text


def test_a_buffer_of_another_dtype_is_refused(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(3)
    Run(tmp_path, model=model).train(1)
    model.running_mean = model.running_mean.double()
    with pytest.raises(CheckpointError, match=r"model.running_mean: torch.float32 in the checkpoint, torch.float64"):
        Run(tmp_path, model=model).load()


def test_master_weights_are_saved_and_rounded_where_there_are_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masters = FlatRun(tmp_path / "run", master=torch.float64)
    masters.train(3)
    saved = everything_whole(masters)
    plain = Run(tmp_path / "run", model=Toy(seed=9))
    assert plain.load()
    assert "which were rounded to torch.float32" in caplog.text
    assert "which were rounded to torch.bfloat16" in caplog.text
    loaded = everything_whole(plain)
    for name in ("up.weight", "up.weight/exp_avg", "frozen.weight", "low", "low/exp_avg_sq", "scale", "wide"):
        assert saved[name].dtype == torch.float64
        assert torch.equal(saved[name].to(loaded[name].dtype), loaded[name]), name
    assert (loaded["up.weight"].dtype, loaded["low"].dtype) == (torch.float32, torch.bfloat16)

    plain.state.step = 4
    plain.plugin.save(plain.state)
    caplog.clear()
    again = FlatRun(tmp_path / "run", master=torch.float64)
    assert again.load()
    assert "rounded" not in caplog.text  # wider: nothing is lost
    for name, value in everything_whole(again).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, loaded[name].to(value.dtype)), name
