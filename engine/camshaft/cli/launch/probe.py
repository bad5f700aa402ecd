"""Two small ranks that meet and add two numbers: does a rendezvous over loopback work on this machine?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from camshaft.environment import Environment

TIMEOUT_S = 30


def two_ranks_meet(folder: Path) -> str:
    """Run both ranks in processes of their own; returns what went wrong, empty if nothing did."""
    environ = {**os.environ, "CAMSHAFT_JOB": str(folder), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "camshaft.cli.launch.probe"]
    ranks = [
        subprocess.Popen([*line, str(rank)], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = []
    try:
        for rank in ranks:
            _, text = rank.communicate(timeout=TIMEOUT_S + 15)
            if rank.returncode:
                lines = text.decode(errors="replace").strip().splitlines()
                errors.append(lines[-1] if lines else f"a rank ended with status {rank.returncode}")
    except subprocess.TimeoutExpired:
        errors.append(f"two ranks did not meet within {TIMEOUT_S + 15} s")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return errors[0] if errors else ""


def _meet(rank: int) -> None:
    from camshaft.distributed import Control, connect, disconnect

    environment = Environment(rank, rank, 2, 2, "torchrun")
    connect(environment, "cpu", TIMEOUT_S)
    control = Control(environment, TIMEOUT_S)
    control.start([rank + 1])
    total = control.finish()
    if total != [3]:
        raise SystemExit(f"two ranks met, and added 1 and 2 to {total}")
    disconnect()


if __name__ == "__main__":
    _meet(int(sys.argv[1]))
