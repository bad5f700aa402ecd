"""Fronts and ranks for the tests, and the proof that none of them is left over."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from camshaft.cli.launch import heartbeat
from camshaft.processes import Process, alive, in_session, send

HERE = Path(__file__).parent
VENV = Path(sys.executable).parent


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's variables."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    kept = {name: value for name, value in os.environ.items() if name not in names and "CAMSHAFT" not in name}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **more}


def until(what: Callable[[], object], seconds: float = 30.0, message: str = "") -> float:
    """Wait for something; returns how long it took."""
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {message or what}"
        time.sleep(0.02)
    return time.monotonic() - start


class Started:
    """A process of ours in a session of its own, with its output in a file."""

    def __init__(self, line: list[str], output: Path, **environ: str) -> None:
        self.output = output
        with output.open("wb") as file:
            self.popen = subprocess.Popen(
                line, env=clean_environment(**environ), stdout=file, stderr=file, start_new_session=True
            )
        self.others: set[Process] = set()

    def text(self) -> str:
        return self.output.read_text()

    def wait(self, seconds: float = 60.0) -> int:
        return self.popen.wait(seconds)

    def note(self, run: Path) -> list[heartbeat.Beat]:
        """Beats of the run's ranks, remembered so that none can be left over."""
        beats = heartbeat.read(run / "heartbeat")
        for beat in beats:
            self.others.add(beat.process)
            session = os.getsid(beat.process.pid) if alive(beat.process) else 0
            if session and session != os.getsid(0):
                self.others.update(in_session(session))
        return beats

    def steps(self, run: Path, ranks: int, step: int, seconds: float = 60.0) -> list[heartbeat.Beat]:
        """Wait until all ranks of a run have come to a step."""

        def there() -> bool:
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}: {self.text()}"
            beats = self.note(run)
            return len(beats) == ranks and all(beat.step >= step for beat in beats)

        until(there, seconds, f"{ranks} ranks at step {step}: {self.text()}")
        return self.note(run)

    def left(self) -> list[Process]:
        return [process for process in self.others if alive(process)]


@contextmanager
def started(line: list[str], output: Path, **environ: str) -> Iterator[Started]:
    """Run a command; whatever the test does, nothing of it is left over, and a test that left something fails."""
    process = Started(line, output, **environ)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.send_signal(signal.SIGKILL)
            process.popen.wait()
        left = [*process.left(), *in_session(process.popen.pid)]
        for one in left:
            send(one, signal.SIGKILL)
    assert not left, f"processes were left over: {left}"


def front(run: Path, launcher: str, mode: str, processes: int = 2) -> list[str]:
    """Command line of the stub front."""
    return [sys.executable, str(HERE / "stub_front.py"), str(run), launcher, str(processes), mode]


def listeners(pid: int) -> set[str]:
    """Local addresses (hexadecimal) on which a process listens for TCP connections."""
    sockets = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(handle.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                found.add(fields[1].split(":")[0])
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
