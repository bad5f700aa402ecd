"""One thread that writes while training goes on, and whose errors are not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

from camshaft.errors import MachineError


class Background:
    """At most one function at a time. A daemon thread: a run that dies does not wait for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def finished(self) -> bool:
        """Whether a function was started, has ended, and nobody has waited for it yet."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, function: Callable[[], None]) -> None:
        assert self._thread is None, "wait for the one before"
        self._thread = threading.Thread(target=self._run, args=(function,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None) -> None:
        """Wait until the function has ended, and raise what it raised.

        Raises:
            MachineError: it has not ended after ``timeout_s`` seconds.
        """
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise MachineError(f"the checkpoint in the background was not written within {timeout_s:g} s")
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _run(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:  # raised where it is waited for
            self._error = error
