"""Recipes of the smallest run that still has what makes plugins wrong.

Documents of uneven length (so that a mean of means is off), a model that neither two nor four ranks divide evenly, tied
embeddings, clipping that is active in every step, a last window that is short.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from camshaft.errors import RecipeError
from camshaft.recipe import check, load
from camshaft.testing.conformance.companions import least, sections, shipped, slots

if TYPE_CHECKING:
    from camshaft.recipe import Resolved

BATCH, SAMPLES, STEPS = 12, 43, 4
"""Four windows, the last one of 7 samples."""
MODEL = {
    "vocab_size": 259,  # odd: no degree of tensor parallel divides it
    "hidden_size": 20,
    "intermediate_size": 38,
    "num_hidden_layers": 5,  # neither 2 nor 4 stages divide it
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
AXES: tuple[Mapping[str, int], ...] = ({}, {"tensor_parallel": 2}, {"pipeline_parallel": 2})
"""Degrees with which a plugin beside the tested one is tried, in this order."""

WAIT_S = 120
"""How long a rank waits for another: on a busy machine, or behind a slow disk, a save takes its time. What hangs is
ended as early by ``run_ranks``."""

Tree = Mapping[str, Any]


def write_corpus(folder: Path) -> Path:
    """One document of 1 to 60 letters a sample; returns ``folder``."""
    path = folder / "documents.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        chooser = random.Random(5)  # noqa: S311  the same documents each time
        sizes = [chooser.randint(1, 60) for _ in range(SAMPLES)]
        texts = [f"{index} " + "".join(chooser.choices("abcdefgh .", k=size)) for index, size in enumerate(sizes)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return folder


def merge(*trees: Tree) -> dict[str, Any]:
    """Sections of later trees over those of earlier ones, key by key to any depth."""
    found: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
            found[key] = merge(found[key], value) if both else value
    return found


class Refused(Exception):
    """Two plugins cannot be in one recipe, and why."""


@dataclass(frozen=True)
class Trial:
    """Makes recipes around one plugin: ``fragment`` is the author's part of them."""

    fragment: Tree
    corpus: Path
    folder: Path
    """Where recipes and runs go."""
    compute: str = "fp64"
    max_norm: float | None = 0.1

    def resolve(self, ranks: int, accumulation: int = 3, *, run: str = "", **changes: Any) -> Resolved:
        """The recipe for ``ranks`` processes, completed by what it lacks: an optimizer, a sum over data ranks.

        Recipes with the same ``run`` share a run directory: the second one continues what the first one began.

        Raises:
            RecipeError: it is refused, with the reasons that the fragment itself gives.
        """
        resolved = self._load(self._tree(ranks, accumulation, run, changes), ranks)
        problems = check(resolved, ranks, device="cpu").problems
        if not problems:
            return resolved
        for tree in self._completed(resolved.tree):
            complete = self._load(tree, ranks)
            if not check(complete, ranks, device="cpu").problems:
                return complete
        raise RecipeError(problems)

    def beside(self, other: str, ranks: int = 2, accumulation: int = 3) -> tuple[Resolved, int]:
        """The recipe with plugin ``other`` beside, and on how many ranks: twice ``ranks`` where ``other`` needs an axis
        of its own. What every recipe here has, clipping for one, is beside it as it is there.

        Raises:
            Refused: no recipe has both, as far as options can be guessed.
        """
        usual = self._load(self._tree(ranks, accumulation, "", {}), ranks)
        if other in usual.recipe.plugins:
            return self.resolve(ranks, accumulation), ranks
        free = [degrees for degrees in AXES if not set(degrees) & set(self.fragment.get("parallel", {}))]
        try:
            guessed = list(sections(other))
        except ValueError as error:
            raise Refused(str(error)) from error
        reasons: dict[str, None] = {}
        for section, degrees in itertools.product(guessed, free):
            many = ranks * (2 if degrees else 1)
            try:
                return self.resolve(many, accumulation, plugins={other: dict(section)}, parallel=dict(degrees)), many
            except RecipeError as error:
                reasons |= {problem.message: None for problem in error.problems[:1]}
        raise Refused("; ".join(reasons))

    def alone(self, resolved: Resolved) -> Resolved:
        """The recipe of one plain process: optimizer and precision of ``resolved``, without anything that divides."""
        kept = {name: value for name, value in resolved.tree["plugins"].items() if slots([name]) & {"optimizer"}}
        tree = {key: value for key, value in resolved.tree.items() if key not in ("parallel", "plugins", "debug")}
        return self._load({**tree, "plugins": kept}, 1)

    def _tree(self, ranks: int, accumulation: int, run: str, changes: Tree) -> dict[str, Any]:
        tree = merge(self._base, self.fragment, changes)
        degrees = tree.get("parallel", {})
        fixed = degrees.get("tensor_parallel", 1) * degrees.get("pipeline_parallel", 1)
        micro = BATCH // (accumulation * max(ranks // fixed, 1))
        tree["batch"] = {"micro_batch_size": micro, "global_batch_size": BATCH} | tree.get("batch", {})
        tree["run"] = {"dir": str(self.folder / (run or f"run{next(_numbers)}"))}
        usual: dict[str, Any] = {"precision": {"compute": self.compute}}
        if self.max_norm is not None:
            usual["clip"] = {"max_norm": self.max_norm}
        if "optimizer" not in slots(name for name, value in tree["plugins"].items() if value is not None):
            usual |= self._optimizer
        owned = slots(name for name, value in tree["plugins"].items() if value is not None)
        fitting = {name: value for name, value in usual.items() if not slots([name]) & owned}
        tree["plugins"] = {**tree["plugins"], **{k: v for k, v in fitting.items() if k not in tree["plugins"]}}
        return tree

    @property
    def _base(self) -> Tree:
        return {
            "schema_version": 1,
            "name": "conformance",
            "seed": 3,
            "model": MODEL,
            "tokenizer": {"type": "byte"},
            "data": {
                "train": {"files": [str(self.corpus / "documents.jsonl")]},
                "validation_fraction": 0.0,
                "sequence_length": 32,
                "pack": False,
                "cache_dir": str(self.corpus / "cache"),
            },
            "training": {"max_epochs": 1, "log_every": 1},
            "launch": {"device": "cpu", "threads_per_rank": 1, "group_timeout_s": WAIT_S},
            "plugins": {},
        }

    @cached_property
    def _optimizer(self) -> Tree:
        """The first shipped optimizer that works element by element, and so beside everything."""
        for name in shipped():
            if "optimizer" in slots([name]):
                tree = {**self._base, "batch": {"micro_batch_size": 1, "global_batch_size": 1}}
                resolved = self._load({**tree, "plugins": {name: dict(least(name))}}, 1)
                if "elementwise_optimizer" in check(resolved, 1, device="cpu").require().plans[name].provides:
                    return {name: dict(least(name))}
        raise LookupError("no shipped plugin is an optimizer that works element by element")

    def _completed(self, tree: Tree) -> Iterator[Tree]:
        """``tree`` with one more shipped plugin that sums gradients, plain ones first."""
        found = []
        for name in shipped():
            if name not in tree["plugins"] and hasattr(plugin := _class(name), "reduce") and hasattr(plugin, "plan"):
                found.append((len(slots([name])), name))
        for _, name in sorted(found):
            yield {**tree, "plugins": {name: dict(least(name)), **tree["plugins"]}}

    def _load(self, tree: Tree, ranks: int) -> Resolved:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"recipe{next(_numbers)}.yaml"
        path.write_text(yaml.safe_dump(dict(tree), sort_keys=False), encoding="utf-8")
        return load(path, world_size=ranks)


def _class(name: str) -> type:
    from camshaft.host import plugin_class

    return plugin_class(name)


_numbers = itertools.count()
