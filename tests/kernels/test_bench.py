"""``camshaft bench kernels``: what it times, what it writes, and that a run reads it."""

import json

import pytest
import torch

from camshaft import ops
from camshaft.cli import run
from camshaft_kernels import bench, cases, table
from camshaft_kernels.offers import OFFERS
from camshaft_kernels.providers.chunked import linear_cross_entropy

TINY = {"tokens": (16, 64), "width": 64, "vocabulary": 50, "elements": 640}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "SMALL", TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_writes_the_table_that_auto_reads(tmp_path, capsys):
    assert run(["bench", "kernels", "--device", "cpu", "--seconds", "0", "--dtype", "fp32"]) == 0
    path = tmp_path / "camshaft" / "kernels" / "cpu.json"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("timing every operation in fp32 on the CPU (") and "threads: " in said[0]
    assert ("torch sees no GPU" in said[0]) == (not torch.cuda.is_available())
    assert any(str(path) in line for line in said)
    found = table.load("cpu")
    assert found.source == str(path) and torch.__version__.startswith(found.machine["torch"])
    rows = {(row.op, row.size): row for row in found.rows}
    assert set(rows[("linear_cross_entropy", 64 * 50)].ms) == {"torch", "unfused"}
    assert {"torch", "torch_segments"} <= set(rows[("document_attention", 64 * 64)].ms)
    assert all(len(row.ms) > 1 and all(ms > 0 for ms in row.ms.values()) for row in found.rows)
    assert found.nearest("linear_cross_entropy", "fp32", 10**9).size == 64 * 50
    assert found.nearest("linear_cross_entropy", "bf16", 10**9) is None
    assert not any("triton" in row.ms for row in found.rows), "the interpreter is for tests"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they are timed on the GPU")
def test_what_is_not_timed_is_told_with_the_reason(capsys):
    words = ["bench", "kernels", "--seconds", "0", "--dtype", "fp32"]
    assert run([*words, "--op", "rms_norm", "--op", "lamb", "--op", "linear_cross_entropy"]) == 0
    first, *said = capsys.readouterr().out.splitlines()
    assert first.startswith("timing rms_norm, lamb, linear_cross_entropy in fp32 on the CPU")
    told = dict(line.split(": no row, ") for line in said if ": no row, " in line)
    assert set(told) == {"rms_norm", "lamb"}
    assert "'triton' needs a GPU, and this run is on a CPU; 'apex' needs a GPU" in told["rms_norm"]
    assert told["lamb"] == "it is not timed alone: auto leaves it to the rules"


def test_some_operations_to_a_file_of_ones_own(tmp_path, capsys):
    words = ["bench", "kernels", "--device", "cpu", "--seconds", "0", "--op", "linear_cross_entropy"]
    assert run([*words, "--output", str(tmp_path / "mine" / "table.json")]) == 0
    tree = json.loads((tmp_path / "mine" / "table.json").read_text())
    assert tree["format"] == table.FORMAT and {row["op"] for row in tree["rows"]} == {"linear_cross_entropy"}
    assert len(tree["rows"]) == 4, "two sizes, two dtypes"


def test_operations_that_were_not_measured_again_stay_in_the_table(tmp_path, capsys):
    path = tmp_path / "table.json"
    words = ["bench", "kernels", "--device", "cpu", "--seconds", "0", "--output", str(path), "--dtype", "fp32"]
    assert run([*words, "--op", "linear_cross_entropy"]) == 0
    assert run([*words, "--op", "document_attention"]) == 0
    assert "beside 2 that were there" in capsys.readouterr().out
    rows = [(row["op"], row["dtype"]) for row in json.loads(path.read_text())["rows"]]
    assert sorted(set(rows)) == [("document_attention", "fp32"), ("linear_cross_entropy", "fp32")]
    assert run([*words, "--op", "document_attention"]) == 0
    assert len(json.loads(path.read_text())["rows"]) == len(rows), "measured again, not added again"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "machine": {"name": "another"}}))
    assert run([*words, "--op", "document_attention"]) == 0
    assert {row["op"] for row in json.loads(path.read_text())["rows"]} == {"document_attention"}
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["table.json"]


def test_without_a_choice_there_is_no_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_present", lambda offer, case, device: offer.provider == "torch")
    assert run(["bench", "kernels", "--device", "cpu", "--output", str(tmp_path / "table.json")]) == 0
    assert "no table was written" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "table.json"):
        assert run(["bench", "kernels", "--device", "cpu", "--output", str(place)]) == 3
        assert "cannot be written" in capsys.readouterr().err


def test_each_case_runs_with_every_form_of_torch(monkeypatch):
    """Forward and backward, with entries and without: what cannot be timed would be left out in silence."""
    timed = set()
    for case in cases.cases(torch.device("cpu"), ("fp32",), frozenset()):
        for provider in ("torch", "unfused"):
            if provider in OFFERS[case.op]:
                case.make(OFFERS[case.op][provider].entries())()
                timed.add(case.op)
    assert timed == set(OFFERS) - {"lamb", "grouped_matmul"}


def test_the_loss_is_really_timed_with_its_gradients():
    made = []

    def counted(*arguments):
        made.append([each.requires_grad for each in arguments[:2]])
        return linear_cross_entropy(*arguments)

    (case, _) = cases.cases(torch.device("cpu"), ("fp32",), frozenset({"linear_cross_entropy"}))
    case.make({"linear_cross_entropy": counted})()
    assert made == [[True, True]]


def test_an_update_is_timed_on_lists():
    seen = []

    def update(parameters, gradients, means, squares, step, *, lr, betas, eps, weight_decay, scale):
        seen.append((len(parameters), float(scale)))

    (case, *_) = cases.cases(torch.device("cpu"), ("fp32",), frozenset({"adamw"}))
    case.make({"updates.adamw": update})()
    assert seen == [(64, 1.0)]


def test_a_provider_that_fails_is_told_and_left_out(monkeypatch, capsys):
    from camshaft_kernels.providers import torch as own

    def broken():
        raise RuntimeError("no such luck\nsecond line")

    monkeypatch.setattr(own, "in_chunks", broken)
    found = bench.measure(torch.device("cpu"), ("fp32",), frozenset({"linear_cross_entropy"}), 0.0)
    assert found.rows == () and "torch failed: no such luck" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["bench"], 0, "kernels  camshaft"),
        (["bench", "--help"], 0, "kernels  camshaft"),
        (["bench", "kernel"], 2, "no plugin called 'kernel' is installed. Did you mean 'kernels'"),
        (["bench", "clip"], 2, "plugin 'clip' measures nothing; these do: kernels"),
        (["bench", "kernels", "--device", "cuda"], 3, "torch sees no GPU here"),
    ],
)
def test_the_command_line(capsys, words, status, text):
    if words[-1] == "cuda" and torch.cuda.is_available():
        status, text = 0, "rows in"
    assert run(words) == status
    streams = capsys.readouterr()
    assert text in streams.out + streams.err


def test_a_plugins_command_that_cannot_be_imported_is_told(monkeypatch, capsys):
    from camshaft.host import plugin_class

    monkeypatch.setattr(plugin_class("kernels"), "commands", {"bench": "camshaft_kernels.bench:mian"})
    assert run(["bench", "kernels"]) == 1
    assert "plugin 'kernels', hook 'bench': camshaft_kernels.bench:mian cannot be imported" in capsys.readouterr().err


def test_shipped_rules_name_what_exists():
    """A rule's provider is one of ours that can be on that kind of device."""
    for device, rules in table.rules().items():
        for op, rule in rules.items():
            assert rule.why and rule.order
            assert all(device in OFFERS[op][provider].devices for provider in rule.order), (device, op)


def test_every_offer_can_name_its_entries():
    """Entries of the providers that need no package are what ``Ops`` takes."""
    for offers in OFFERS.values():
        for provider in ("torch", "unfused", "torch_segments", "torch_varlen"):
            if provider in offers:
                ops.Ops().replace(offers[provider].entries())
