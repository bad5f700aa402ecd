"""Every plugin of ours under the kit that everybody's plugins are under: a table line each."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from camshaft.testing import Conformance
from camshaft.testing.conformance.companions import shipped
from camshaft.testing.conformance.trial import Refused, Trial, write_corpus

pytestmark = pytest.mark.broad


class Line(NamedTuple):
    """Kind, options, and whatever else of the class differs."""

    kind: str
    options: dict[str, Any] = {}
    changes: dict[str, Any] = {}


TP, PP = {"parallel": {"tensor_parallel": 2}}, {"parallel": {"pipeline_parallel": 2}}


def linear(self: Conformance, step: int, total: int) -> float:
    """What ``lr_schedule`` must give below."""
    return (step + 1) / 2 if step < 2 else 1.0 - 0.9 * (step - 2) / (total - 3)


LINEAR = {"reference_lr": linear}
DEEPSPEED = {"compute": "fp32", "except_for": {"compute": "DeepSpeed sums gradients in fp32 at most"}}
TABLE = {
    "adafactor": Line("optimizer", {"lr": 1e-3}),
    "adamw": Line("optimizer", {"lr": 1e-3}),
    "checkpoint": Line("observer", {"every_steps": 2}),
    "clip": Line("observer", {"max_norm": 0.1}),
    "compile": Line("observer", {"backend": "eager"}),
    "console": Line("observer"),
    "ddp": Line("reducer", {"bucket_size_mb": 0.005}),
    "deepspeed": Line("sharder", {"stage": 2}, DEEPSPEED),
    "jsonl": Line("observer"),
    "kernels": Line("kernel", {"linear_cross_entropy": "torch"}),
    "lamb": Line("optimizer", {"lr": 1e-3}),
    "ledger": Line("observer"),
    "lion": Line("optimizer", {"lr": 1e-3}),
    "lr_schedule": Line("observer", {"type": "linear", "warmup_steps": 2, "min_lr_ratio": 0.1}, LINEAR),
    "muon": Line("optimizer", {"lr": 1e-3}),
    "pipeline": Line("schedule", {}, PP),
    "precision": Line("observer", {"compute": "fp64"}),
    "recompute": Line("observer", {"mode": "full"}),
    "sgd": Line("optimizer", {"lr": 1e-2, "momentum": 0.9}),
    "tensor_parallel": Line("sharder", {}, TP),
    "tensorboard": Line("observer"),
    "wandb": Line("observer", {"mode": "offline"}),
    "zero": Line("sharder", {"stage": 3}),
}


def case(name: str, line: Line) -> type[Conformance]:
    """The class that the kit asks for."""
    changes = dict(line.changes)
    recipe = {"plugins": {name: line.options}, "parallel": changes.pop("parallel", {})}
    return type(f"Test_{name}", (Conformance,), {"plugin": name, "kind": line.kind, "recipe": recipe, **changes})


@pytest.fixture(autouse=True)
def imported(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed itself, before ranks are forked that would import it each."""
    if getattr(request.cls, "plugin", "") == "deepspeed":
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        importlib.import_module("camshaft_deepspeed.runtime").load()


globals().update({f"Test_{name}": case(name, line) for name, line in TABLE.items()})


def test_every_shipped_plugin_has_a_line() -> None:
    assert {*shipped()} == TABLE.keys()


@pytest.mark.parametrize(
    ("name", "neighbours"),
    [
        ("jsonl", {"pipeline": 4, "tensor_parallel": 4, "zero": 2}),
        ("ddp", {"pipeline": 4, "tensor_parallel": 4}),
        ("tensor_parallel", {"pipeline": 4, "zero": 2}),
    ],
)
def test_neighbours_are_those_that_claims_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, neighbours: dict[str, int]
) -> None:
    monkeypatch.delenv("CAMSHAFT_FULL_CONFORMANCE", raising=False)
    fragment = {"plugins": {name: TABLE[name].options}, "parallel": TABLE[name].changes.get("parallel", {})}
    trial = Trial(fragment, write_corpus(tmp_path), tmp_path)
    found = {}
    for other in globals()[f"Test_{name}"]().neighbours():
        try:
            found[other] = trial.beside(other)
        except Refused as reason:
            assert len(str(reason).split()) > 3
    assert {other: size for other, (_, size) in found.items()} == neighbours
    assert all(other in resolved.recipe.plugins for other, (resolved, _) in found.items())


@pytest.mark.parametrize("neighbour", ["clip", "precision", "lr_schedule"])
def test_the_reference_has_what_a_neighbour_changes(tmp_path: Path, neighbour: str) -> None:
    """Neighbours that change numbers, which CAMSHAFT_FULL_CONFORMANCE=1 tries too, change the plain process's alike."""
    from camshaft.testing.run import record_ranks

    kit: Conformance = globals()["Test_sgd"]()
    fragment = {"plugins": {"sgd": TABLE["sgd"].options}}
    trial = Trial(fragment, write_corpus(tmp_path), tmp_path)
    resolved, size = trial.beside(neighbour)
    ranks = record_ranks(resolved, size)
    kit.check_parity(trial, resolved, ranks)
    rates = {record.lr for record in ranks[0]}
    assert len(rates) == (len(ranks[0]) if neighbour == "lr_schedule" else 1)
