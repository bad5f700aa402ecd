"""The trainer's end of one worker process: messages there and back, none of which can wait without a limit."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POLL_S = 0.05


class WorkerLost(Exception):
    """The worker ended, said that it failed, or did not answer in time. The text says which.

    ``final``: another worker would fail in the same way.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class Worker:
    """A running ``camshaft_wandb.worker``. What wandb prints is appended to ``output``.

    Raises:
        OSError: the process cannot be started, or ``output`` cannot be written.
    """

    def __init__(self, request: dict[str, Any], output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        files = Path(request["init"]["dir"]) / "wandb"
        with output.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "camshaft_wandb.worker",
                ],  # -P: the working directory is no place for modules
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # wandb reports its own errors and timings to the server, offline too, and waits for that at its exit
                # and would keep artifacts that wait for `wandb sync` in the user's home
                env={"WANDB_ERROR_REPORTING": "false", "WANDB_DATA_DIR": str(files), **os.environ},
                start_new_session=True,  # Ctrl-C at the terminal is the trainer's to handle
                bufsize=0,
            )
        self._received = b""
        try:
            self.send({**request, "parent": os.getpid()})
        except BaseException:
            self.dispose()
            raise

    def send(self, message: dict[str, Any]) -> None:
        """Write one message. Blocks while the worker does not read; ``kill`` from another thread ends that.

        Raises:
            WorkerLost: the worker is gone.
            TypeError: a value is no number, text, list or dict.
        """
        assert self._process.stdin is not None
        data = memoryview(json.dumps(message, default=float).encode() + b"\n")
        try:
            while data:
                data = data[self._process.stdin.write(data) :]
        except OSError as error:
            raise WorkerLost(f"its process ended with status {self._process.poll()}") from error

    def expect(self, event: str, deadline: Callable[[], float]) -> dict[str, Any]:
        """Wait for ``event`` until ``deadline()``, a time of ``time.monotonic`` that may move meanwhile.

        Raises:
            WorkerLost: it failed, ended, or the deadline passed.
        """
        assert self._process.stdout is not None
        while True:
            line, found, rest = self._received.partition(b"\n")
            if found:
                self._received = rest
                message: dict[str, Any] = json.loads(line)
                if message["event"] == event:
                    return message
                if message["event"] == "failed":
                    raise WorkerLost(message["reason"], final=message["final"])
                continue
            if time.monotonic() >= deadline():
                raise WorkerLost("no answer in time")
            if select.select([self._process.stdout], [], [], _POLL_S)[0]:
                data = os.read(self._process.stdout.fileno(), 65536)
                if not data:
                    raise WorkerLost(f"its process ended with status {self._process.wait()}")
                self._received += data

    def wait(self, seconds: float) -> None:
        """Give the process time to end by itself, then end it."""
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process now. May be called from any thread, and twice. wandb's service sees it and ends itself."""
        self._process.kill()

    def dispose(self) -> None:
        """End the process if it still runs, reap it and close the channels."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
