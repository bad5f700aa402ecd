"""Lion updates tensors in runs, so that directions of a few are there at once; the numbers are those of one run."""

import torch

from camshaft_lion import optimizer

SIZES = (3, 40, 7, 1, 0, 60, 5)


def updated(monkeypatch, run):
    monkeypatch.setattr(optimizer, "RUN", run)
    torch.manual_seed(5)
    tensors = [torch.randn(size) for size in SIZES]
    lion = optimizer.Lion([{"params": tensors, "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.99))
    for _ in range(3):
        for tensor in tensors[1:]:
            tensor.grad = torch.randn_like(tensor)
        lion.step()
    return tensors


def test_runs_change_no_number(monkeypatch):
    whole = updated(monkeypatch, 10**6)
    for run in (1, 47, 48, 60):
        assert all(map(torch.equal, updated(monkeypatch, run), whole))
    torch.manual_seed(5)
    before = [torch.randn(size) for size in SIZES]
    assert torch.equal(whole[0], before[0]) and not torch.equal(whole[1], before[1])


def test_a_run_holds_few_directions(monkeypatch):
    held, lerp = [], torch._foreach_lerp
    monkeypatch.setattr(
        torch, "_foreach_lerp", lambda new, *rest: (held.append([each.numel() for each in new]), lerp(new, *rest))[1]
    )
    updated(monkeypatch, 48)
    assert held == [[40, 7, 1, 0], [60], [5]] * 3
