"""The list of files that took most, over workers of xdist and over processes that tests started."""

import re
from pathlib import Path

import pytest

pytest_plugins = ("pytester",)
BURN = "import time\nbegun = time.process_time()\nwhile time.process_time() - begun < {}: pass"
HERE = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_file_whose_child_computes_is_the_first(pytester, monkeypatch, workers):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    quick = {f"test_{number:02}": "def test(): pass" for number in range(12)}
    child = f"import subprocess, sys\ndef test(): subprocess.run([sys.executable, '-c', {BURN.format(0.5)!r}])"
    pytester.makepyfile(**quick, test_child=child)
    said = pytester.runpytest_subprocess("-p", "spent", "-n", workers).stdout.str()
    listed = re.findall(r"^ *([\d.]+) s  (\w+\.py)$", said, re.MULTILINE)
    assert len(listed) == 10 and listed[0][1] == "test_child.py" and 0.5 <= float(listed[0][0]) < 5
    assert re.search(r"[\d.]+ s  all 13 files", said)


def test_a_few_files_are_not_listed(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    pytester.makepyfile(test_one="def test(): pass")
    assert "processor" not in pytester.runpytest_subprocess("-p", "spent", "-p", "no:xdist").stdout.str()
