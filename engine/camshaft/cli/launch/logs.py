"""What the engine and its plugins log: rank 0 shows it on the terminal, and every rank keeps it in its own log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from camshaft.cli.streams import put


class Messages(logging.Handler):
    """Messages of ``camshaft`` and ``camshaft_*`` loggers from INFO up; libraries' own from WARNING up."""

    def __init__(self, keep: Callable[[str], None], show: bool) -> None:
        super().__init__(logging.INFO)
        self._keep, self._show = keep, show
        self.setFormatter(logging.Formatter("%(message)s"))

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message concerns the user of a run."""
        return record.levelno >= logging.WARNING or record.name.split(".")[0].split("_")[0] == "camshaft"

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        self._keep(text)
        if self._show:
            # Looked up at every message: a live display puts its own stream there, so that lines do not mix.
            put(sys.stderr, text)


@contextmanager
def messages(keep: Callable[[str], None], *, show: bool) -> Iterator[None]:
    """Give messages to ``keep``, and to the terminal with ``show``, while the block runs."""
    handler, root = Messages(keep, show), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
