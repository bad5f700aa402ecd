"""The GPU of the tensors is the current one while something is launched on them, whichever was current before."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from camshaft_kernels import devices
from camshaft_kernels.triton import _gpu


class Machine:
    """Four GPUs, none of which is there; ``entered`` counts how often another one was made the current one."""

    def __init__(self, monkeypatch):
        self.current, self.entered = 0, 0
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        self.entered += 1
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def on(index):
    """What a tensor of GPU ``index`` says of itself."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index), get_device=lambda: index)


def test_the_tensors_device_is_current_inside(machine):
    with devices.on_device_of(on(2)):
        assert machine.current == 2
        with devices.on_device_of(on(3)):
            assert machine.current == 3
        assert machine.current == 2
    assert (machine.current, machine.entered) == (0, 2)
    with pytest.raises(KeyError), devices.on_device_of(on(1)):
        raise KeyError
    assert machine.current == 0


def test_on_the_current_device_and_on_a_cpu_nothing_is_entered(machine):
    for tensor in (on(0), torch.ones(1)):
        with devices.on_device_of(tensor):
            assert machine.current == 0
    assert machine.entered == 0


def test_what_is_compiled_is_left_to_the_compiler(machine, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with devices.on_device_of(on(2)):
        assert machine.current == 0


def test_the_age_is_that_of_the_device_in_question(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (7, 5) if device and device.index == 1 else (9, 0)
    )
    assert _gpu(None) is None and _gpu(torch.device("cuda", 0)) is None
    assert "capability 7.5, and 8.0 is needed" in _gpu(torch.device("cuda", 1))
