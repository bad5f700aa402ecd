"""A benchmark that is cut off has written what it found before."""

import json

import pytest

from tools.bench import __main__ as command
from tools.bench import overhead, single_gpu

OVERHEAD = {
    "what": "a step",
    "engine_us": 2.0,
    "hand_us": 1.0,
    "ratio_of_medians": 2.0,
    "overhead_us_paired_median": 1.0,
}
FAILED = {"case": "1B", "contestant": "PyTorch", "failed": "CUDA out of memory"}


def cut_off(blocks, only, keep):
    for rows in ([FAILED], [FAILED, FAILED]):
        keep({"device": "cuda", "board": "a GPU", "rows": rows, "targets": []})
    raise KeyboardInterrupt


def test_files_hold_what_was_found_before_the_end(monkeypatch, tmp_path):
    monkeypatch.setattr(overhead, "run", lambda blocks, case: OVERHEAD)
    monkeypatch.setattr(single_gpu, "run", cut_off)
    monkeypatch.setattr("sys.argv", ["bench", "overhead", "single_gpu", "--output", str(tmp_path / "found")])
    with pytest.raises(KeyboardInterrupt):
        command.main()
    kept = json.loads((tmp_path / "found/bench.json").read_text())
    assert kept["overhead"] == OVERHEAD
    assert kept["single_gpu"]["rows"] == [FAILED, FAILED]
    text = (tmp_path / "found/bench.md").read_text()
    assert text.count("| 1B | PyTorch | CUDA out of memory |") == 2
    assert {each.name for each in (tmp_path / "found").iterdir()} == {"bench.json", "bench.md"}
