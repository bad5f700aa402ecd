"""Ending this process from a thread, when its main thread is stuck in a collective and cannot raise anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn

from camshaft.errors import CamshaftError

Ender = Callable[[CamshaftError], NoReturn]

_enders: list[Ender] = []


def register(ender: Ender) -> None:
    """Let ``ender`` say, in place of what came before it, how a process ends: with which record, in which log."""
    _enders[:] = [ender]


def end(error: CamshaftError) -> NoReturn:
    """End this process now, from any thread, with the exit status of ``error``.

    Without a registered way the error is written to standard error.
    """
    if _enders:
        _enders[0](error)
    os.write(2, f"error: {error}\n".encode())
    os._exit(error.exit_status)
