from __future__ import annotations

import io
import json
import re
import sys

import pytest
from rich.console import Console
from tracking_records import eval_record, train_record

from camshaft_console import Options, Plugin
from camshaft_console.display import Plain, Rich, open_display
from camshaft_console.line import duration, short_number, words
from camshaft_console.progress import Progress


class Stream(io.StringIO):
    """A text stream that says of itself what a test wants it to say."""

    def __init__(self, *, tty: bool = False, encoding: str = "utf-8") -> None:
        super().__init__()
        self._tty, self._encoding = tty, encoding

    def isatty(self) -> bool:
        return self._tty

    @property
    def encoding(self) -> str:
        return self._encoding


@pytest.fixture
def capture(monkeypatch):
    """Puts a stream in the place of standard output; in the test itself, because pytest does so before it."""

    def put(stream: Stream | None = None) -> Stream:
        stream = stream or Stream()
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    return put


def _run(state, records, *, status="finished", **options):
    plugin = Plugin(Options(**options))
    plugin.pre_run(state)
    for record in records:
        plugin.log(state, record)
    plugin.close(state, status)


def test_exact_words_of_a_full_record():
    record = train_record(10) | {
        "perf/mfu": 0.41234,
        "memory/allocated_gib": 12.345,
        "plugin/checkpoint/save_s": 0.51,
        "train/loss": 5.12344,
        "train/grad_norm": 1.2341,
    }
    assert " ".join(words(record, 300, 62.9)) == (
        "step=10/300 loss=5.1234 lr=2.00e-03 grad_norm=1.234 tok/s=5.4k mfu=0.412 mem=12.35GiB eta=1m02s "
        "checkpoint/save_s=0.51"
    )


def test_exact_words_of_an_evaluation():
    assert " ".join(words(eval_record(100), 300)) == (
        "step=100/300 eval_loss=4.5000 perplexity=90.02 bits_per_byte=1.2500"
    )


def test_absent_metrics_are_left_out_and_values_that_are_not_finite_are_shown():
    record = {"progress/global_step": 3, "train/loss": float("nan"), "train/grad_norm": float("inf")}
    assert words(record, 9) == ["step=3/9", "loss=nan", "grad_norm=inf"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (999.94, "999.9"), (999.96, "1.0k"), (5421, "5.4k"), (1_234_567, "1.2M"), (2.5e9, "2.5G")],
)
def test_short_numbers(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (59.9, "59s"), (62, "1m02s"), (3599, "59m59s"), (3723, "1h02m"), (200_000, "2d07h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_eta_is_measured_from_the_start_of_this_segment():
    now = [100.0]
    progress = Progress(300, clock=lambda: now[0])
    progress.add(200)
    assert progress.eta_s() is None
    now[0] = 110.0
    progress.add(220)
    assert progress.eta_s() == pytest.approx(40.0)


def test_eta_follows_the_last_records():
    now = [0.0]
    progress = Progress(1000, clock=lambda: now[0])
    for step in range(101):
        now[0] = float(step if step < 50 else 50 + (step - 50) * 2)
        progress.add(step)
    assert progress.eta_s() == pytest.approx(900 * 2)


def test_eta_is_unknown_while_no_step_was_done():
    progress = Progress(10)
    progress.add(5)
    progress.add(5)
    assert progress.eta_s() is None


def test_a_pipe_gets_one_plain_line_a_record(make_state, capture):
    output = capture()
    state = make_state(total=20)
    _run(state, [train_record(10), eval_record(10), train_record(20)], curve=False)
    first, second, third = output.getvalue().splitlines()
    assert re.fullmatch(r"step=10/20 loss=0\.6123 lr=2\.00e-03 grad_norm=0\.333 tok/s=5\.4k eta=\d+s", first)
    assert second.startswith("step=10/20 eval_loss=4.5000 ")
    assert third.endswith("eta=0s")
    values = dict(word.split("=") for word in first.split())
    assert float(values["loss"]) == pytest.approx(train_record(10)["train/loss"], abs=1e-4)
    assert float(values["lr"]) == 2e-3


def test_other_ranks_are_silent(make_state, capture):
    output = capture()
    _run(make_state(is_main=False), [train_record(10), train_record(20)])
    assert output.getvalue() == ""


def test_the_curve_ends_a_run_and_is_ascii_where_the_encoding_is(make_state, capture):
    drawings = {}
    for encoding in ("utf-8", "ascii"):
        stream = capture(Stream(encoding=encoding))
        _run(make_state(total=30), [train_record(10), train_record(20), eval_record(20), train_record(30)])
        drawings[encoding] = stream.getvalue()
    assert drawings["utf-8"].endswith("loss over steps: ⠒ train ● eval\n")
    assert "┤" in drawings["utf-8"]
    assert drawings["ascii"].endswith("loss over steps: * train o eval\n")
    assert drawings["ascii"].isascii()


@pytest.mark.parametrize(("status", "drawn"), [("finished", True), ("interrupted", True), ("failed", False)])
def test_a_failed_run_ends_with_its_error_and_not_with_a_curve(make_state, capture, status, drawn):
    output = capture()
    _run(make_state(), [train_record(10), train_record(20)], status=status)
    assert ("loss over steps" in output.getvalue()) is drawn


def test_the_curve_of_a_resumed_run_includes_earlier_segments(make_state, capture):
    output = capture()
    state = make_state(step=100, total=200)
    earlier = [train_record(50), {"train/loss": "nan", "progress/global_step": 60}, eval_record(100), train_record(110)]
    state.world.run.metrics.write_text("".join(json.dumps(record) + "\n" for record in earlier) + '{"torn')
    _run(state, [train_record(150), train_record(200)])
    lines = output.getvalue().splitlines()
    assert lines[-2].split() == ["50", "200"]
    assert "● eval" in lines[-1]


def test_a_closed_pipe_ends_the_display_and_not_the_run(make_state, capture, caplog):
    class Broken(Stream):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    capture(Broken())
    _run(make_state(), [train_record(10), train_record(20)])
    assert caplog.text.count("standard output cannot be written") == 1


def test_style_auto_takes_the_live_line_only_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(open_display("auto", Stream()), Plain)
    live = open_display("auto", Stream(tty=True))
    assert isinstance(live, Rich)
    live.close()
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_display("auto", Stream(tty=True)), Plain)
    assert isinstance(open_display("plain", Stream(tty=True)), Plain)


def _terminal(width: int = 100) -> tuple[Rich, io.StringIO]:
    stream = io.StringIO()
    return Rich(Console(file=stream, force_terminal=True, width=width, color_system=None)), stream


def test_the_live_line_is_one_line_that_replaces_itself():
    display, stream = _terminal()
    for step in (10, 20):
        display.progress(words(train_record(step), 300), step / 300)
    text = stream.getvalue()
    display.close()
    assert text.count("\n") == 0
    assert "\x1b[2K" in text
    assert "step 10/300" in text and "step 20/300  loss 0.3562" in text


def test_a_narrow_terminal_cuts_the_live_line_instead_of_wrapping_it():
    display, stream = _terminal(width=40)
    display.progress(words(train_record(10), 300), 0.5)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", stream.getvalue())
    display.close()
    assert "\n" not in shown and len(shown) <= 40
    assert "…" in shown


def test_permanent_lines_stay_above_the_live_line_and_keep_their_text():
    display, stream = _terminal()
    display.progress(words(train_record(10), 300), 0.1)
    display.permanent("step=10/300 eval_loss=4.5000 [bold]not markup[/bold]")
    display.close()
    assert "step=10/300 eval_loss=4.5000 [bold]not markup[/bold]\n" in stream.getvalue()


def test_an_interrupted_run_leaves_a_clean_terminal(make_state, capture):
    output = capture()
    plugin = Plugin(Options(style="rich", curve=False))
    state = make_state(total=300)
    plugin.pre_run(state)
    assert sys.stdout is not output  # other code's prints go above the live line
    plugin.log(state, train_record(10))
    plugin.close(state, "interrupted")
    assert sys.stdout is output
    shown = output.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.removesuffix("\x1b[?25h").endswith("\n")  # the shell's prompt gets a line of its own


def test_the_cursor_is_never_left_hidden_while_training():
    display, stream = _terminal()
    display.progress(words(train_record(10), 300), 0.1)
    shown = stream.getvalue()
    display.close()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_unknown_styles_are_refused():
    with pytest.raises(ValueError, match="style"):
        Options(style="fancy")
