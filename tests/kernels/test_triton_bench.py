"""The benchmark of kernels: its contestants compute the same, and it says where it cannot measure."""

import pytest
import torch
from triton_cases import DEVICE

from camshaft_kernels.stopwatch import Sampler, Stopwatch
from tools.bench import __main__ as command
from tools.bench import kernels
from tools.bench.kernels_forms import COMPILED, EAGER, FOREACH, FUSED, OURS

TRITON = "interpreted"
SIZES = {"tiny": {"tokens": 8, "hidden": 16, "inner": 24, "queries": 4, "keys": 2, "width": 6}}
CASES = {case.name: case for case in kernels.cases(SIZES, vocabulary=50, elements=64 * 8)}


class Steady(Stopwatch):
    """A stopwatch that measures nothing: what this tries is everything around it."""

    def __init__(self):
        super().__init__(torch.device(DEVICE))

    def prepare(self, call):
        call()
        return Still(self, call, 0.0)


class Still(Sampler):
    def __call__(self):
        self.call()
        return 2.0


def results(case, name):
    torch.manual_seed(0)
    inputs = case.inputs(torch.device(DEVICE))
    made = kernels.once(case.forms[name](), inputs, case.trained)()
    return inputs[0] if made is None else list(made)


def test_ours_computes_what_torchs_form_does():
    assert len(CASES) == 8
    for case in CASES.values():
        reference = FOREACH if "adamw" in case.name else EAGER
        for one, other in zip(results(case, OURS), results(case, reference), strict=True):
            deviation = (one.float() - other.float()).norm() / other.float().norm()
            assert one.dtype == other.dtype
            assert deviation < 1e-2, case.name


def test_rows_and_verdicts():
    case = CASES["rms_norm tiny"]
    rows = kernels.measure(case, Steady(), copied=1e9, blocks=2, contestants=[OURS, EAGER])
    assert [row["contestant"] for row in rows] == [OURS, EAGER]
    assert case.traffic == 5 * 2 * 8 * 16
    for row in rows:
        assert row["gb_s"] == case.traffic / 2e-3 / 1e9
        assert row["of_copy"] == case.traffic / 2e-3 / 1e9
    assert kernels.verdicts(rows) == []
    others = [*rows, {**rows[1], "contestant": COMPILED, "ms": 1.5}, {**rows[1], "contestant": "Liger", "ms": 3.0}]
    (verdict,) = kernels.verdicts(others)
    assert (verdict["peer"], verdict["speed"], verdict["met"]) == (COMPILED, 0.75, False)
    machine = {"gpu": "one", "triton": "3.6"}
    others[-1]["waits"] = True
    text = kernels.table(
        {"machine": machine, "copy_gb_s": 3000.0, "cache": "cold", "rows": others, "targets": [verdict]}
    )
    assert f"| rms_norm tiny | {COMPILED} | 0.750 | 1.0 | missed |" in text
    assert sum("3.000 (waits for the GPU)" in line for line in text) == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("No module named 'liger_kernel'"), "No module named 'liger_kernel'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_contestant_that_is_not_there_or_fails_says_so(error, told):
    def absent():
        raise error

    case = CASES["swiglu tiny"]
    case = kernels.Case(case.name, {EAGER: case.forms[EAGER], "Liger": absent}, case.inputs, case.traffic)
    rows = kernels.measure(case, Steady(), copied=1e9, blocks=1)
    assert rows[1] == {"case": "swiglu tiny", "contestant": "Liger", "failed": told}
    assert "ms" in rows[0]
    assert any(
        told in line
        for line in kernels.table({"machine": {}, "copy_gb_s": 1, "cache": "cold", "rows": rows, "targets": []})
    )


def test_updates_are_timed_without_a_backward():
    rows = kernels.measure(CASES["adamw 0 Mi float32"], Steady(), 1e9, blocks=1, contestants=[OURS, FUSED, FOREACH])
    assert all("failed" not in row for row in rows)
    assert len(rows) == 3


def test_without_a_gpu():
    if torch.cuda.is_available():
        assert kernels.missing() is None
        return
    found = kernels.run(None)
    assert found == {"missing": "kernels are timed on a CUDA GPU, and torch sees none here"}
    assert "Not measured: kernels are timed" in command.markdown({"machine": {}, "kernels": found})
