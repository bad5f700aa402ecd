"""Whatever values and plugins come together: `validate` ends with 0 or 2, and names place and fix of every fault."""

from __future__ import annotations

import json
import random
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from camshaft import host
from camshaft.cli import run
from camshaft.recipe.schema import Batch, Data, Launch, Model, Parallel, Training

INTS = {"usual": [1, 1, 2, 2, 3, 4, 8, 64], "odd": [-1, 0, 1, 2, 5, 7, 1000, 2**20, 2**31, 2**53, 2**70]}
FLOATS = {"usual": [0.1, 0.5, 0.9], "odd": [-1.0, 0.0, 0.1, 1.0, 2.0, 1e-300, 1e12, 1e308]}
TEXTS = [
    "",
    "a",
    "model.layers.*",
    "model.norm",
    "auto",
    "torch",
    "region",
    "row:3",
    "lm_head",
    "*",
    "[",
    "eager",
    "zbv",
]
OPTIMIZERS = ("adamw", "sgd", "lion", "muon", "lamb", "adafactor")
CORE: dict[str, type[BaseModel]] = {
    "model": Model, "data": Data, "batch": Batch, "parallel": Parallel, "training": Training, "launch": Launch,
}  # fmt: skip


class Writer:
    """Draws values of any type that a section may have."""

    def __init__(self, seed: int, kind: str) -> None:
        self.draw, self._ints, self._floats = random.Random(seed), INTS[kind], FLOATS[kind]

    def section(self, model: type[BaseModel], share: float) -> dict[str, Any]:
        fields = {each.alias or name: each for name, each in model.model_fields.items()}
        chosen = {name: each for name, each in fields.items() if each.is_required() or self.draw.random() < share}
        return {name: self.value(each.annotation) for name, each in chosen.items()}

    def value(self, kind: Any) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is typing.Annotated:
            return self.value(arguments[0])
        if origin in (typing.Union, types.UnionType):
            return self.value(self.draw.choice(arguments))
        if origin is Literal:
            return self.draw.choice(arguments)
        if origin is list:
            return [self.value(arguments[0]) for _ in range(self.draw.choice([0, 1, 2, 4]))]
        if origin is dict:
            return {name: self.value(arguments[1]) for name in self.draw.sample(TEXTS, 2)}
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return self.section(kind, 0.3)
        scalars = {bool: [True, False], int: self._ints, float: self._floats, str: TEXTS}
        return self.draw.choice(scalars.get(kind, [None]))

    def recipe(self) -> dict[str, Any]:
        draw = self.draw
        tree: dict[str, Any] = {
            "schema_version": 1,
            "name": "drawn",
            "model": {"preset": "llama-tiny"},
            "tokenizer": {"type": "byte"},
            "data": {"sequence_length": 64},
            "batch": {"micro_batch_size": draw.choice([1, 2, "auto"]), "global_batch_size": draw.choice([8, 24, 64])},
            "training": {"max_steps": draw.choice([1, 5])},
            "launch": {"processes": draw.choice([1, 2, 4, 8])},
            "parallel": draw.choice([{}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}]),
        }
        for name, model in CORE.items():
            if draw.random() < 0.15:
                tree[name] = {**tree[name], **self.section(model, 0.2)}
        chosen = [*draw.sample(list(host.installed()), draw.choice([1, 2, 3])), draw.choice(OPTIMIZERS)]
        share = draw.choice([0.0, 0.1, 0.3])
        tree["plugins"] = {name: self.section(host.plugin_class(name).Options, share) for name in chosen}
        return tree


@pytest.mark.parametrize("kind", list(INTS))
@pytest.mark.parametrize("seed", range(4))
def test_every_fault_has_place_and_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, seed: int
) -> None:
    monkeypatch.chdir(tmp_path)
    writer, path, ended = Writer(seed, kind), tmp_path / "drawn.yaml", set()
    for _ in range(40):
        path.write_text(json.dumps(writer.recipe(), indent=1))
        status = run(["validate", path.name])
        ended.add(status)
        faults = capsys.readouterr().err.splitlines()
        assert status in (0, 2) and bool(faults) == (status == 2), path.read_text()
        for line in faults:
            assert line.startswith("error: drawn.yaml:") and " Fix: " in line, f"{line}\n{path.read_text()}"
    assert 2 in ended
