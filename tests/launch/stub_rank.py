"""A rank that trains nothing: ``python stub_rank.py MODE [ARGUMENT]`` inside the real rank wrapper.

Every step takes 50 ms and is announced as backward. A stop is answered with a file ``saved_N`` in the run directory.
"""

import os
import sys
import time
from pathlib import Path

from camshaft.cli.launch import heartbeat
from camshaft.cli.launch.rank import Station, supervised
from camshaft.environment import read_environment
from camshaft.errors import Interrupted, NonFiniteLoss
from camshaft.rundir import RunDirectory

STEPS = int(os.environ.get("STUB_STEPS", "400"))


def work(station: Station, mode: str) -> int:
    rank = station.environment.rank
    if station.directory is None:
        station.enter(RunDirectory(os.environ["STUB_RUN"]).create())
    print(f"hello from rank {rank}, terminal: {sys.stdout.isatty()}", flush=True)
    peers = MODES.get(mode)
    for step in range(STEPS):
        station.heartbeat.beat(step, "backward")
        if peers is not None:
            peers(station, step)
        if station.stop.requested and mode != "deaf":
            station.heartbeat.beat(step, "save")
            time.sleep(0.3)
            (Path(station.directory.path) / f"saved_{rank}").touch()
            raise Interrupted(f"asked to stop after step {step}; a checkpoint was written")
        time.sleep(0.05)
    return 0


def all_at(station: Station, step: int) -> None:
    """Wait for both ranks, as a collective would: one of them may have started seconds after the other."""
    while [beat.step for beat in heartbeat.read(station.directory.heartbeat)] != [step, step]:
        time.sleep(0.01)


def nan(station: Station, step: int) -> None:
    """Rank 1 meets a NaN; rank 0 hears only that its peer has gone, and ends before rank 1's record is there."""
    if step == 5 and station.environment.rank == 0:
        all_at(station, step)
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    if step == 5:
        time.sleep(0.3)
        raise NonFiniteLoss("train/loss is nan at step 5")


def memory(station: Station, step: int) -> None:
    if step == 5 and station.environment.rank == 1:
        raise MemoryError("12 GiB")


def crash(station: Station, step: int) -> None:
    if step == 5 and station.environment.rank == 1:
        os.abort()


def early(station: Station, step: int) -> None:
    """Rank 1 leaves with 0 but without its record, as a library's os._exit would make it."""
    if step == 5 and station.environment.rank == 1:
        os._exit(0)


def seven(station: Station, step: int) -> None:
    """Rank 1 leaves with 7 and without its record; rank 0 notices nothing."""
    if step == 5 and station.environment.rank == 1:
        os._exit(7)


def sleepy(station: Station, step: int) -> None:
    """Rank 1 stays in backward of step 5 for good; rank 0 waits for it in the reduction until it times out."""
    if step == 5 and station.environment.rank == 1:
        time.sleep(600)
    if step == 5:
        station.heartbeat.beat(step, "reduce")
        all_at(station, step)
        raise RuntimeError("[../gloo/transport/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation")


MODES = {"nan": nan, "memory": memory, "crash": crash, "early": early, "seven": seven, "sleepy": sleepy}

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    sys.exit(supervised(read_environment(os.environ), lambda station: work(station, words[0])))
