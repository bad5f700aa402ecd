"""``camshaft doctor``: findings, and status 3 when something essential is missing."""

import sys

import pytest

from camshaft.cli import doctor, inventory, run


def test_this_machine_can_train(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(["doctor"]) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()[:-1]}
    assert list(lines) == list(doctor.CHECKS)
    assert "two ranks met over loopback" in lines["rendezvous"] and str(tmp_path) in lines["cache"]
    assert "deepspeed" in lines["launchers"] and "torchrun" in lines["launchers"]


def test_something_essential_missing_is_status_3(capsys, monkeypatch):
    def broken():
        raise ImportError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "CHECKS", {"torch": broken, "apex": lambda: ("note", "not installed")})
    assert run(["doctor"]) == 3
    streams = capsys.readouterr()
    assert "missing" in streams.out and "libtorch.so" in streams.out and "apex" in streams.out
    assert "missing what every run needs: torch" in streams.err


def test_a_cache_that_cannot_be_written_is_missing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(doctor, "CHECKS", {"cache": doctor._cache})
    assert [finding.grade for finding in doctor.findings()] == ["missing"]


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
    text, found = inventory.apex()
    assert words in text and found is real
    assert not {"apex", "amp_C"} & set(sys.modules)


def test_which_packages_of_kernels(monkeypatch, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    grade, text = doctor.CHECKS["kernels"]()
    assert "flash_attn of unknown version" in text and "transformer_engine" in text and grade in ("ok", "note")


def test_what_a_run_records_is_a_fixed_list(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_API_KEY", "hunter2")
    facts = inventory.run_environment(tmp_path, "torchrun", 2)
    assert set(facts) == {
        "python", "system", "cores", "packages", "cuda", "nccl", "gpus", "launcher", "world_size", "git_commit",
    }  # fmt: skip
    assert facts["git_commit"] is None and facts["packages"]["torch"]
    assert "hunter2" not in str(facts)
