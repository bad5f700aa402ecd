"""A broken plugin under the real launcher: one error on the terminal, the right status, and nobody left waiting."""

import json
import os
import re
import subprocess
import sys
import time

import small_folder
from small_folder import TWO

PLUGIN = '''
import camshaft


class Plugin(camshaft.Plugin):
    """Sums something in every step; rank 1 takes another operation in the fifth."""

    @camshaft.hookimpl
    def plan(self):
        return camshaft.Plan()

    @camshaft.hookimpl
    def reduce(self, state):
        import torch

        line = state.world.mesh.channel("crooked", "dp")
        if state.world.rank == 1 and state.step == 4:
            line.broadcast(torch.ones(3), 0, "reduce").wait()
        else:
            line.all_reduce(torch.ones(3), "reduce").wait()
'''

RECIPE = small_folder.recipe(
    "crooked",
    batch={"micro_batch_size": 1, "global_batch_size": 4},
    training={"max_steps": 1000, "log_every": 100},
    launch=TWO,
    run={"dir": "run"},
    plugins={"ddp": {}, "crooked": {}, "adamw": {"lr": 1e-3}, "ledger": {}},
)


def test_a_run_whose_ranks_diverge_ends_with_one_error(tmp_path):
    site = tmp_path / "site"
    small_folder.install(site, "crooked", PLUGIN)
    small_folder.fill(tmp_path, RECIPE, name="crooked")
    done = subprocess.run(
        [sys.executable, "-m", "camshaft", "train", "crooked.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    ended = time.time()
    output = done.stdout + done.stderr
    assert done.returncode == 3, output
    said = re.findall(
        r"rank 1, plugin crooked, hook reduce: call \d+ broadcast on dp; rank 0 did all_reduce on", output
    )
    assert len(said) == 1 and "error: rank" in output, output
    records = [json.loads((tmp_path / "run" / "logs" / f"rank_{rank}.exit.json").read_text()) for rank in (0, 1)]
    for record in records:
        assert (record["status"], record["kind"], record["step"]) == (3, "error", 4), record
        assert ended - record["time"] < 10
    assert records[0]["error"] == records[1]["error"]
