"""``python -m tools.schedules``: what it prints, writes and refuses."""

import subprocess
import sys

import pytest

from camshaft_pipeline import table
from camshaft_pipeline.schedules import make


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "tools.schedules", *map(str, words)], capture_output=True, text=True, timeout=60
    )


def test_a_schedule_is_drawn_and_written_and_read_back(tmp_path):
    files = {name: tmp_path / f"drawn.{name}" for name in ("svg", "trace", "csv")}
    done = run("zbv", "-p", 2, "-m", 3, *[word for name, path in files.items() for word in (f"--{name}", path)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("zbv, 2 rank(s)") and done.stdout.count("\nrank ") == 2
    assert files["svg"].read_text().startswith("<svg") and "traceEvents" in files["trace"].read_text()
    assert table.read(files["csv"].read_text(), "zbv", "drawn.csv").programs == make("zbv", 2, 3).programs
    again = run(files["csv"])
    assert again.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]


@pytest.mark.parametrize(
    ("words", "said"), [(["gpip"], "did you mean gpipe"), (["1f1b", "-m", 0], "needs ranks and microbatches")]
)
def test_what_cannot_be_is_refused_with_status_2(words, said):
    done = run(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
