"""Where lines go: a plain stream, or a terminal with one line that is updated in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Display(Protocol):
    """What the plugin writes to."""

    def progress(self, words: Sequence[str], fraction: float) -> None:
        """Show the newest training record; ``fraction`` is the done part of the run, from 0 to 1."""

    def permanent(self, text: str) -> None:
        """Show text that stays."""

    def close(self) -> None:
        """Leave the stream as it was found. May be called twice."""


class Plain:
    """One line a record, flushed, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def progress(self, words: Sequence[str], fraction: float) -> None:
        self.permanent(" ".join(words))

    def permanent(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class Rich:
    """One live line with a bar; everything else that is printed scrolls by above it.

    There is no refresh thread: the line changes when a record comes, and the last one stays. The cursor is never
    left hidden, so that even a process that is killed leaves a usable terminal.
    """

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()
        console.show_cursor(True)

    def progress(self, words: Sequence[str], fraction: float) -> None:
        self._live.update(self._line(words, fraction), refresh=True)

    def _line(self, words: Sequence[str], fraction: float) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        text = Text(no_wrap=True, overflow="ellipsis")
        for word in words:
            name, _, value = word.partition("=")
            text.append(name, style="dim").append(" ").append(value, style="bold").append("  ")
        row = Table.grid(padding=(0, 1))
        row.add_column(width=16)
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_row(ProgressBar(total=1.0, completed=min(1.0, fraction), width=16), text)
        return row

    def permanent(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def open_display(style: str, stream: TextIO) -> Display:
    """The display for ``style``: ``auto`` takes the live line on a terminal that can do it."""
    if style == "plain":
        return Plain(stream)
    from rich.console import Console

    console = Console(file=stream, force_terminal=True if style == "rich" else None)
    # isatty itself is asked: rich also takes FORCE_COLOR, which CI sets, for a terminal
    live = style == "rich" or (stream.isatty() and console.is_terminal and not console.is_dumb_terminal)
    return Rich(console) if live else Plain(stream)
