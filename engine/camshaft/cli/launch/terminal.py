"""The front's terminal, handed to rank 0 as file descriptors.

Launchers write to a log; rank 0 still gets the terminal (or pipe, or file) itself, so that it can draw on it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path

_NAME = "terminal"
_STREAMS = (1, 2)


class Lender:
    """The front's side: whoever connects to the socket in the job's private folder gets standard output and error."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(folder / _NAME))
        self._socket.listen(4)
        threading.Thread(target=self._lend, name="camshaft-terminal", daemon=True).start()

    def _lend(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._socket.accept()
                with peer, contextlib.suppress(OSError):
                    socket.send_fds(peer, [b"\0"], list(_STREAMS))

    def close(self) -> None:
        """Stop lending; what was lent stays open on the other side."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def borrow(folder: Path) -> None:
    """Rank 0's side: write where the front writes. Without a front everything stays as it is."""
    sys.stdout.flush()
    sys.stderr.flush()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer, contextlib.suppress(OSError):
        peer.settimeout(10)
        peer.connect(str(folder / _NAME))
        _, handles, _, _ = socket.recv_fds(peer, 1, len(_STREAMS))
        for handle, stream in zip(handles, _STREAMS, strict=False):
            os.dup2(handle, stream)
            os.close(handle)
