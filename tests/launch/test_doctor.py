"""``camshaft doctor``: findings, and status 3 when something essential is missing."""

import sys

import pytest

from camshaft.cli import doctor, inventory, run
from camshaft_kernels import packages


def test_this_machine_can_train(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(["doctor"]) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()[:-1]}
    assert list(lines) == [*doctor.CHECKS, "apex", "kernels"]
    assert "two ranks met over loopback" in lines["rendezvous"] and str(tmp_path) in lines["cache"]
    assert "deepspeed" in lines["launchers"] and "torchrun" in lines["launchers"]


def test_something_essential_missing_is_status_3(capsys, monkeypatch):
    def broken():
        raise ImportError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "CHECKS", {"torch": broken, "python": doctor.CHECKS["python"]})
    assert run(["doctor"]) == 3
    streams = capsys.readouterr()
    assert "missing" in streams.out and "libtorch.so" in streams.out and "python" in streams.out
    assert "missing what every run needs: torch" in streams.err


def test_a_cache_that_cannot_be_written_is_missing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(doctor, "CHECKS", {"cache": doctor._cache})
    assert [finding.grade for finding in doctor.findings() if finding.what == "cache"] == ["missing"]


def test_what_a_plugin_looks_for_is_a_note_at_most(monkeypatch):
    """Nothing that a plugin lacks keeps every run from starting, and a broken plugin is no end of the others."""
    monkeypatch.setattr(doctor, "CHECKS", {})
    monkeypatch.setattr(packages, "found", lambda: iter([(True, "fine", "here"), (False, "absent", "not installed")]))
    assert [(each.grade, each.what) for each in doctor.findings()] == [("ok", "fine"), ("note", "absent")]
    monkeypatch.setattr(packages, "found", lambda: 1 / 0)
    (finding,) = doctor.findings()
    assert finding == doctor.Finding("note", "kernels", "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("modules", "words", "real"),
    [
        ({"amp_C", "apex"}, "NVIDIA apex with CUDA extensions", True),
        ({"apex", "apex/normalization", "apex/multi_tensor_apply"}, "without its CUDA extensions", False),
        ({"apex"}, "unrelated web package", False),
        (set(), "not installed", False),
    ],
)
def test_which_apex(monkeypatch, tmp_path, modules, words, real):
    for name in modules:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    text, found = packages.apex()
    assert words in text and found is real
    assert not {"apex", "amp_C"} & set(sys.modules)


def test_which_packages_of_kernels(monkeypatch, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    fine, _, text = list(packages.found())[1]
    assert "flash_attn of unknown version" in text and "transformer_engine" in text
    assert fine == ("not installed" not in text)


def test_what_a_run_records_is_a_fixed_list(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_API_KEY", "hunter2")
    facts = inventory.run_environment(tmp_path, "torchrun", 2, {"no_such_module": "no-such-package"})
    assert set(facts) == {
        "python", "system", "cores", "packages", "cuda", "nccl", "gpus", "launcher", "world_size", "git_commit",
    }  # fmt: skip
    assert facts["git_commit"] is None and facts["packages"]["torch"]
    assert facts["packages"]["no-such-package"] is None
    assert "hunter2" not in str(facts)
