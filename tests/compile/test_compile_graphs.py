"""CUDA graphs: each forward begins a new generation of them, and numbers are those of a run without."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from compile_cases import recipe

from camshaft_compile.watching import Watcher

STATE = SimpleNamespace(extras={})


@pytest.mark.parametrize(("graphs", "times"), [(True, 3), (False, 0)])
def test_graphs_are_told_where_a_forward_begins(monkeypatch, graphs, times):
    done = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: done.append("mark"))
    blocks = SimpleNamespace(graphs=graphs, compiled=False)
    forward = Watcher(STATE, "compile", blocks, strict=False).around(done.append)
    for batch in range(3):
        forward(batch)
    marks = ["mark"] if graphs else []
    assert done == [*marks, 0, *marks, 1, *marks, 2] and done.count("mark") == times


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: only its launches can be recorded")
def test_training_and_evaluation_are_those_of_a_run_without_graphs(make_recipe):
    """Evaluation has no backward that keeps what one block made until the next has read it."""
    training = {"max_steps": 8, "log_every": 1, "eval_every": 3, "eval_samples": 8}
    found = {}
    for name, compiled in (("plain", None), ("graphs", {"cuda_graphs": True, "strict": True})):
        sections = {"batch": {"micro_batch_size": 8, "global_batch_size": 8}, "launch": {"device": "cuda"}}
        data = {**make_recipe({}).tree["data"], "validation_fraction": 0.2}
        resolved = recipe(make_recipe, 1, compiled, compute="fp32", data=data, training=training, **sections)
        folder = resolved.path.parent / name
        line = [sys.executable, "-m", "camshaft", "train", str(resolved.path), f"run.dir={folder}"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        found[name] = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    for key in ("train/loss", "eval/loss"):
        plain, graphs = ([row[key] for row in found[name] if key in row] for name in ("plain", "graphs"))
        assert graphs == pytest.approx(plain, rel=1e-4) and len(plain) >= 3
