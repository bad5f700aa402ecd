"""``camshaft verify``: table, certificate and status; what a later run finds of it."""

import json

import pytest
from verify_faults import FAULTS, Fault, planted
from verify_recipes import recipe

from camshaft.cli import run
from camshaft.recipe import load
from camshaft.rundir import RunDirectory
from camshaft.verify import certificate
from camshaft.verify.examine import verify
from camshaft.verify.runs import Failure


def command(folder, name, *more):
    return run(["verify", str(folder / f"{name}.yaml"), *more])


def test_a_green_proof_leaves_a_certificate_that_training_finds(tmp_path, capsys):
    resolved = recipe(tmp_path, "zero1")
    assert certificate.lookup(resolved) is None
    assert command(tmp_path, "zero1", "--own-precision", "--output", str(tmp_path / "new" / "proof.json")) == 0
    shown = capsys.readouterr().out
    assert "result       green" in shown and "\ngradients " in shown and "certificate" in shown
    content = json.loads((tmp_path / "new" / "proof.json").read_text())
    assert content["result"] == "green" and content["finding"] is None and len(content["plan"]) == 16
    assert set(content["compared"]) >= {"gradients", "norm", "coefficient", "weights", "optimizer", "loss"}
    for each in content["compared"].values():
        assert each["values"] >= 4 and each["worst"] <= each["bound"] and each["where"].startswith("step ")
    assert content["own_precision"]["weights"] <= 1e-2
    assert content["proof"]["axes"]["dp"] == 2 and content["versions"]["torch"]
    found = certificate.lookup(resolved)
    assert found["result"] == "green" and found["valid_for"] == content["valid_for"]


def test_where_the_certificate_goes_is_looked_at_before_the_proof(tmp_path, capsys, monkeypatch):
    recipe(tmp_path, "ddp")
    monkeypatch.setattr("camshaft.verify.examine.verify", lambda *_, **__: pytest.fail("proven"))
    kept = (tmp_path / "ddp.yaml").read_text()
    for place, status in (("ddp.yaml", 2), ("", 3), ("ddp.yaml/certificate.json", 3)):
        assert command(tmp_path, "ddp", "--output", str(tmp_path / place)) == status
        assert capsys.readouterr().err.startswith("error: --output ")
    assert (tmp_path / "ddp.yaml").read_text() == kept


def test_a_run_keeps_whether_it_is_proven(tmp_path):
    """Also where the proof had to lower a limit of gradients that was never reached."""
    from camshaft.cli.launch.claim import begin

    plugins = {"sgd": {"lr": 1e-2}, "clip": {"max_norm": 1e6}}
    resolved = recipe(tmp_path, "sgd", plugins=plugins)
    begin(RunDirectory(tmp_path / "one").create(), resolved, 1, "camshaft train")
    assert RunDirectory(tmp_path / "one").read_status()["certificate"] is None
    report = verify(resolved)
    assert report.small.sections["clip"]["max_norm"] < 100 < report.shrunk.sections["clip"]["max_norm"]
    assert report.comparison.worst["coefficient"].bound == 1e-12
    certificate.keep(resolved, certificate.certificate(report, "sgd.yaml", "0" * 16))
    begin(RunDirectory(tmp_path / "two").create(), resolved, 1, "camshaft train")
    assert RunDirectory(tmp_path / "two").read_status()["certificate"]["result"] == "green"


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("training.max_steps=70", True),
        ("name=other", True),
        ("data.train=python-source", True),
        ("plugins.adamw.lr=0.1", False),
        ("plugins.zero.stage=2", False),
        ("model.tie_word_embeddings=false", False),
        ("data.pack=true", False),
    ],
)
def test_what_a_certificate_is_valid_for(tmp_path, change, same):
    from test_verify_shrink import small

    resolved = recipe(tmp_path, "zero1")
    other = load(tmp_path / "zero1.yaml", [change])
    one, two = (certificate.valid_for(small(each, tmp_path)[0]) for each in (resolved, other))
    assert (one == two) is same


def test_a_red_proof_says_first_tensor_step_and_plugin(tmp_path, capsys):
    recipe(tmp_path, "ddp")
    fault = next(fault for fault in FAULTS if fault.name == "factor on one gradient of a bucket")
    with planted(fault):
        assert command(tmp_path, "ddp", "--output", str(tmp_path / "red.json")) == 1
    told = capsys.readouterr()
    assert "result       red" in told.out and "error: 'ddp' changes the numbers" in told.err
    assert "step 1, gradients of 'model." in told.err
    content = json.loads((tmp_path / "red.json").read_text())
    assert content["result"] == "red" and content["finding"]["plugins"] == ["ddp"]
    assert content["finding"]["sign"]["step"] == 1 and "ddp" in content["finding"]["smallest_set"]


def dies(bucket):
    import os

    os._exit(9)


def raises(bucket):
    raise ValueError("no room")


@pytest.mark.parametrize("how", [dies, raises], ids=["dies", "raises"])
def test_a_rank_that_fails_is_a_finding_without_a_traceback(tmp_path, how):
    resolved = recipe(tmp_path, "ddp")
    with planted(Fault("fails", "ddp", "ddp", "camshaft_ddp.bucket:Bucket.finish", lambda right: how)):
        report = verify(resolved)
    assert isinstance(report.finding.sign, Failure) and report.finding.plugins == ("ddp",)
    text = str(report.finding)
    assert "Traceback" not in text and "\n" not in text
    assert ("no room" in text) == (how is raises), text


def test_without_gpus_they_are_refused(tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    recipe(tmp_path, "ddp")
    assert command(tmp_path, "ddp", "--on-gpu") == 3
    assert "2 ranks need as many GPUs" in capsys.readouterr().err


def test_a_recipe_at_fault_is_told_as_ever(tmp_path, capsys):
    recipe(tmp_path, "ddp")
    assert command(tmp_path, "ddp", "parallel.tensor_parallel=3") == 2
    assert "error:" in capsys.readouterr().err


def test_a_recipe_without_a_small_form_here_is_told_at_its_own_place(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    recipe(tmp_path, "ddp")
    assert command(tmp_path, "ddp", "launch.device=cuda", "plugins.kernels.rms_norm=triton") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: override 2 (plugins.kernels.rms_norm): plugins.kernels: no small form of the recipe")
    assert "--on-gpu" in told and "fit.yaml" not in told


def stays_away(right):
    """Rank 1 does not take part in the sums."""
    import torch.distributed as dist
    from verify_changes import no_sum

    def launch(bucket, channel, dtype):
        (no_sum if dist.get_rank() == 1 else right)(bucket, channel, dtype)

    return launch


def test_ranks_that_wait_for_one_that_never_comes_are_a_finding(tmp_path, monkeypatch):
    from camshaft.verify import shrink

    monkeypatch.setattr(shrink, "TIMEOUT_S", 4)
    resolved = recipe(tmp_path, "ddp")
    with planted(Fault("stays away", "ddp", "ddp", "camshaft_ddp.bucket:Bucket.launch", stays_away)):
        report = verify(resolved)
    assert report.finding.plugins == ("ddp",), str(report.finding)
    assert report.finding.smallest == ("ddp",) and report.seconds < 120
