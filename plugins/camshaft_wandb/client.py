"""The trainer's side of W&B: a bounded queue, and a thread that carries it to a worker process.

Only ``Client.log`` and ``Client.close`` run on the training thread. ``log`` copies a record and returns. The thread
starts a worker; when that fails or takes too long it starts a second one in offline mode. Records wait in the queue
until a worker is ready, so a run that ends up offline has them all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camshaft_wandb.alerts import Alert, Watch
from camshaft_wandb.process import Worker, WorkerLost

QUEUE_RECORDS = 10_000
_LOOK_S = 1.0
"""How often the thread asks, while nothing comes, whether that is a stall."""
_IMPORT_LIMIT_S = 60.0
"""Starting Python and importing wandb: seconds on a shared file system with a cold cache, and nobody waits."""
_EXIT_LIMIT_S = 1.0
"""Everything is on disk and uploaded when the worker says that it is done; its exit handlers may hang all the same."""
_RESERVE_S = 4.0
"""Part of the closing time that is kept for recording offline what an unfinished attempt to go online held up."""
_logger = logging.getLogger("camshaft.wandb")


class Client:
    """Feeds records to W&B until ``close``. Warns at most a few times, never raises.

    ``request`` is what the worker needs to start: ``mode``, ``init`` and ``settings``. ``watch`` is shown every record
    on the thread, and asked about silence between them; what it tells becomes an alert.
    """

    def __init__(
        self,
        request: dict[str, Any],
        *,
        output: Path,
        start_timeout_s: float,
        close_timeout_s: float,
        watch: Watch | None = None,
    ) -> None:
        self._request = request
        self._output = output
        self._start_timeout_s = start_timeout_s
        self._close_timeout_s = close_timeout_s
        self._watch = watch
        self._heard = time.monotonic()
        self._records: deque[dict[str, Any]] = deque()
        """Messages for the worker; nearly all of them are records."""
        self._changed = threading.Condition()
        self._exit_code: int | None = None
        self._close_by = float("inf")
        self._worker: Worker | None = None
        self._given_up = False
        self._directory = ""
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="camshaft-wandb", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, float | int]) -> None:
        """Queue one record; when the queue is full the oldest one goes."""
        self.send({"log": dict(record)})

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message for the worker; as ``log``."""
        with self._changed:
            if self._given_up or len(self._records) >= QUEUE_RECORDS:
                self.dropped += 1
                if self._given_up:
                    return
                self._records.popleft()
            self._records.append(message)
            self._heard = time.monotonic()
            self._changed.notify()

    def close(self, exit_code: int) -> None:
        """Send what is queued and finish the run, in the closing time at most; what is left then is given up."""
        with self._changed:
            self._exit_code = exit_code
            self._close_by = time.monotonic() + self._close_timeout_s
            self._changed.notify()
        self._thread.join(self._close_timeout_s + 0.5)
        if self._thread.is_alive():
            with self._changed:
                self._given_up = True
                worker = self._worker
            if worker is not None:
                worker.kill()
            self._thread.join(1.0)
            self._warn_unfinished()
        lost = self.dropped + len(self._records)
        if lost:
            _logger.warning("%d record(s) did not reach W&B", lost)

    def _run(self) -> None:
        try:
            for mode in dict.fromkeys((self._request["mode"], "offline")):
                if self._record(mode):
                    return
        except Exception as error:  # nothing of wandb's may end the run
            _logger.warning("W&B is off: %s: %s", type(error).__name__, error)
        with self._changed:
            self._given_up = True

    def _record(self, mode: str) -> bool:
        """One worker from start to finish. False: it was lost, and another one may do better."""
        worker = None
        try:
            worker = self._start(mode)
            self._pump(worker)
        except (OSError, WorkerLost) as error:
            if self._given_up:
                return True
            last = mode == "offline" or (isinstance(error, WorkerLost) and error.final)
            outcome = "W&B is off" if last else "recording offline instead"
            _logger.warning("W&B: %s; %s (details: %s)", str(error).rstrip("."), outcome, self._output)
            self._given_up = last
            return last
        finally:
            if worker is not None:
                worker.dispose()
        return True

    def _start(self, mode: str) -> Worker:
        worker = Worker({**self._request, "mode": mode}, self._output)
        last = mode == "offline"
        try:
            with self._changed:
                self._worker = worker
                if self._given_up:
                    raise WorkerLost("the run is over")
            self._wait(worker, "imported", _IMPORT_LIMIT_S, last)
            ready = self._wait(worker, "ready", self._start_timeout_s, last)
        except BaseException:
            worker.dispose()
            raise
        self._directory = ready["dir"]
        _logger.info("W&B: %s", ready["url"] or f"offline, upload with: wandb sync {self._directory}")
        return worker

    def _wait(self, worker: Worker, event: str, limit_s: float, last: bool) -> dict[str, Any]:
        """A run that closes meanwhile shortens the wait, and leaves room for an offline attempt if one is left."""
        limit = time.monotonic() + limit_s
        reserve = 0.0 if last else min(_RESERVE_S, self._close_timeout_s / 2)
        return worker.expect(event, lambda: min(limit, self._close_by - reserve))

    def _pump(self, worker: Worker) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._records) or self._exit_code is not None, _LOOK_S)
                message = self._records.popleft() if self._records else None
                over, quiet = self._exit_code is not None, time.monotonic() - self._heard
            if message is None:
                if over:
                    break
                self._alert(worker, [] if self._watch is None else [self._watch.silent(quiet)])
                continue
            try:
                worker.send(message)
            except WorkerLost:
                with self._changed:
                    self._records.appendleft(message)
                raise
            except (TypeError, ValueError):  # a plugin's value that is no number
                self.dropped += 1
                continue
            if self._watch is not None and "log" in message:
                self._alert(worker, self._watch.observe(message["log"]))
        worker.send({"finish": self._exit_code})
        try:
            done = worker.expect("done", lambda: self._close_by)
        except WorkerLost:
            self._warn_unfinished()
            return
        if done["failures"]:
            _logger.warning("W&B refused %d call(s); the first: %s", done["failures"], done["reason"])
        worker.wait(min(_EXIT_LIMIT_S, self._close_by - time.monotonic()))

    def _alert(self, worker: Worker, alerts: Sequence[Alert | None]) -> None:
        """An alert that meets a worker that is lost goes to the next one with what is left."""
        waiting = [{"alert": alert._asdict()} for alert in alerts if alert is not None]
        for place, message in enumerate(waiting):
            try:
                worker.send(message)
            except WorkerLost:
                with self._changed:
                    self._records.extendleft(reversed(waiting[place:]))
                raise

    def _warn_unfinished(self) -> None:
        where = f": upload the rest with: wandb sync {self._directory}" if self._directory else ""
        _logger.warning("W&B did not finish in %g s%s", self._close_timeout_s, where)
