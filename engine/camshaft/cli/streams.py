"""Standard streams that a run can do without: closed from the start, a pipe whose reader has gone, a full disk."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

_NAMES = ("stdin", "stdout", "stderr")


def secure() -> None:
    """Open /dev/null where descriptor 0, 1 or 2 is closed, or the next file of a run would be opened as one of them."""
    for number, name in enumerate(_NAMES):
        try:
            os.fstat(number)
        except OSError:
            mode = os.O_WRONLY if number else os.O_RDONLY
            opened = os.open(os.devnull, mode)  # the lowest free number: all below are open by now
            os.set_inheritable(opened, True)
            setattr(sys, name, open(opened, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def announce(text: str = "", *, err: bool = False) -> None:
    """Write a line that the run does not depend on, to standard output or, with ``err``, to standard error."""
    put(sys.stderr if err else sys.stdout, text)


def put(stream: TextIO, text: str) -> None:
    """Write a line; a stream that cannot take it is silenced, and nobody is stopped by it."""
    try:
        stream.write(_encodable(text, stream) + "\n")
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream is closed
        silence(stream)


def silence(stream: TextIO) -> None:
    """Point a stream at /dev/null, so that what its buffer still holds cannot fail again when the program ends."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _encodable(text: str, stream: TextIO) -> str:
    """``text`` with escapes for the characters that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
