"""From a recipe to small ones: the same plugins along the same axes, in fp64, for a few steps on a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camshaft.errors import Problem, RecipeError
from camshaft.host import plugin_class
from camshaft.recipe import check, load
from camshaft.verify import corpus, sizes
from camshaft.verify.code import files
from camshaft.verify.sorting import BY_DESIGN, Sorted

if TYPE_CHECKING:
    from camshaft.recipe import Checked, Resolved

TIMEOUT_S = 20
"""Seconds that a collective waits: what has not come by then does not come."""
_MORE_LAYERS = 40
EVALUATIONS = {"eval_every": 2, "eval_samples": 7}
"""Before the first step and behind every second one, of a number of samples that no number of ranks divides."""


@dataclass(frozen=True, slots=True)
class Small:
    """A small recipe: its tree without plugins and axes, and what they are; ``arrange`` makes recipes of it.

    ``sections``: plugin to its section, in recipe order; ``degrees``: axis to degree; ``compute``: what all numbers
    are computed in; ``notes``: what of the recipe could not be kept, in sentences.
    """

    tree: Mapping[str, Any]
    sections: Mapping[str, Any]
    degrees: Mapping[str, int]
    folder: Path
    compute: str
    device: str = "cpu"
    notes: tuple[str, ...] = ()
    micro: int = 1
    accumulation: int = 1
    own: Mapping[str, Any] = field(default_factory=dict)
    """Section of the owner of ``precision`` as the recipe has it."""
    taken_out: Mapping[str, Any] = field(default_factory=dict)
    """Options of the recipe that are not in it, by key, with their values."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Files that sections of plugins name, with a digest of each."""

    @property
    def evaluates(self) -> bool:
        """Whether it evaluates between steps."""
        return "eval_every" in self.tree["training"]

    @property
    def samples(self) -> int:
        """Samples of a whole window."""
        data = 1
        for axis, degree in self.degrees.items():
            data *= degree if axis.startswith("dp") else 1
        return self.micro * self.accumulation * data

    def arrange(
        self, names: Sequence[str], degrees: Mapping[str, int], label: str, *, whole: bool = False
    ) -> tuple[Resolved, int]:
        """The recipe with plugins ``names`` on axes ``degrees`` over the same windows, and its number of processes.

        ``whole``: each window is one microbatch.

        Raises:
            RecipeError: it is not legal.
        """
        ranks = 1
        for degree in degrees.values():
            ranks *= degree
        tree = dict(self.tree)
        tree["parallel"] = _parallel(degrees)
        tree["launch"] = {**tree["launch"], "processes": ranks, "device": self.device}
        tree["run"] = {"dir": str(self.folder / f"run-{label}")}
        tree["batch"] = {
            "micro_batch_size": self.samples if whole else self.micro,
            "global_batch_size": self.samples,
        }
        tree["plugins"] = {name: section for name, section in self.sections.items() if name in names}
        path = self.folder / f"{label}.yaml"
        path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
        resolved = load(path, world_size=ranks)
        check(resolved, ranks, device=self.device).require()
        return resolved, ranks

    def all(self, sorted_: Sorted, label: str = "all") -> tuple[Resolved, int]:
        """The recipe with everything that is compared."""
        return self.arrange(sorted_.all, self.degrees, label)


def _parallel(degrees: Mapping[str, int]) -> dict[str, Any]:
    keys = {"pp": "pipeline_parallel", "cp": "context_parallel", "tp": "tensor_parallel"}
    found: dict[str, Any] = {key: degrees.get(axis, 1) for axis, key in keys.items()}
    halves = {"dp_shard": "data_parallel_shard", "dp_replicate": "data_parallel_replicate"}
    if any(degrees.get(axis, 1) > 1 for axis in halves):
        found |= {key: degrees[axis] for axis, key in halves.items() if axis in degrees}
    return found


def shrink(
    resolved: Resolved,
    checked: Checked,
    sorted_: Sorted,
    folder: Path,
    *,
    steps: int,
    device: str = "cpu",
    deep: bool = False,
) -> Small:
    """The small recipe of ``resolved``, which ``checked`` found legal for its own number of processes.

    ``deep``: with as many layers as the recipe has, for plugins that name layers by their numbers.

    Raises:
        RecipeError: no smaller recipe of these plugins is legal; with the problems of the last attempt.
    """
    problems: Sequence[Problem] = ()
    for strict in (True, False):
        for small in _attempts(resolved, checked, sorted_, folder, steps, device, deep=deep):
            fitted, problems = _fit(small, sorted_, resolved, strict=strict)
            if fitted is not None:
                _write_corpus(fitted, resolved.recipe.seed, steps)
                return fitted
    raise RecipeError([_of_the_recipe(problem, resolved, device) for problem in problems])


def _of_the_recipe(problem: Problem, resolved: Resolved, device: str) -> Problem:
    """``problem`` of a small form at its place in the recipe: the small form's own file is gone by then."""
    message = f"no small form of the recipe is legal on this machine's {device.upper()}: {problem.message}"
    gpus = "; --on-gpu proves it on GPUs" if problem.fix and device == "cpu" else ""
    return resolved.problem(problem.key, message, problem.fix + gpus)


def _attempts(
    resolved: Resolved, checked: Checked, sorted_: Sorted, folder: Path, steps: int, device: str, *, deep: bool
) -> Iterator[Small]:
    """Ever larger ones: more layers, more microbatches, then the recipe's own depth of the pipeline."""
    assert checked.mesh is not None and checked.batch is not None and checked.config is not None
    degrees = {axis.name: axis.degree for axis in checked.mesh.axes}
    # Along an axis that only plugins work along which are left out, there is one rank.
    small, config = sorted_.left_alone(sorted_.all, sizes.small_degrees(degrees)), checked.config
    pipelines = dict.fromkeys([small["pp"], *((3, 4, degrees["pp"]) if small["pp"] > 1 and degrees["pp"] > 2 else ())])
    for pipeline in pipelines:
        small = {**small, "pp": pipeline}
        least = sizes.least_layers(config.num_hidden_layers, degrees["pp"], pipeline)
        most = least + (_MORE_LAYERS if pipeline > 1 else 1)
        counts = [] if deep else [*range(least, most, pipeline)]
        for accumulation in sizes.accumulations(checked.batch.accumulation, pipeline):
            for layers in [*counts, config.num_hidden_layers]:
                yield _small(resolved, checked, sorted_, folder, steps, device, small, layers, accumulation)


def _small(
    resolved: Resolved,
    checked: Checked,
    sorted_: Sorted,
    folder: Path,
    steps: int,
    device: str,
    small: Mapping[str, int],
    layers: int,
    accumulation: int,
) -> Small:
    assert checked.mesh is not None and checked.batch is not None and checked.config is not None
    recipe, config = resolved.recipe, checked.config
    degrees = {axis.name: axis.degree for axis in checked.mesh.axes}
    model = sizes.small_model(config, degrees, small, layers)
    length = sizes.as_even(sizes.LENGTH, recipe.data.sequence_length, degrees.get("tp", 1), small.get("tp", 1))
    micro = {1: 1}.get(checked.batch.micro_batch_size, 2 + checked.batch.micro_batch_size % 2)
    evaluates, source = recipe.training.eval_every is not None, {"blend": [{"prefix": str(folder / "corpus")}]}
    tree: dict[str, Any] = {
        "schema_version": 1,
        "name": "verify",
        "seed": recipe.seed,
        "model": {key: value for key, value in model.items() if value is not None},
        "data": {
            "train": source,
            **({"validation": source} if evaluates else {"validation_fraction": 0.0}),
            "sequence_length": length,
            "pack": recipe.data.pack,
            "document_mask": recipe.data.document_mask,
            "cache_dir": str(folder),
        },
        "training": {"max_tokens": 1, "log_every": 1, **(EVALUATIONS if evaluates else {})},
        "launch": {"launcher": "torchrun", "threads_per_rank": 1, "group_timeout_s": TIMEOUT_S},
        "debug": {"contracts": True},
    }
    shrinkage = _parameters(model) / config.num_parameters()
    parts = small.get("tp", 1) * small["pp"]
    sections = {
        name: dict(resolved.tree["plugins"].get(name) or {})
        | sizes.small_options(recipe.plugins[name], shrinkage, _parameters(model) // parts, 8, steps)
        for name in recipe.plugins
        if name in sorted_.all
    }
    own = sections.get(sorted_.precision or "", {})
    absent = {
        f"plugins.{name}": resolved.tree["plugins"].get(name)
        for name, why in sorted_.left_out.items()
        if why == BY_DESIGN
    }
    made = Small(
        tree, sections, small, folder, "fp64", device,
        micro=micro, accumulation=accumulation, own=own, taken_out=absent,
        files=files(sections.values(), resolved.base_dir, Path()),
    )  # fmt: skip
    samples = made.samples * (steps - 1) + max(made.samples * 3 // 5, 1)  # the last window is short
    training = {**tree["training"], "max_tokens": samples * length}
    return replace(made, tree={**tree, "training": training})


def _parameters(model: Mapping[str, Any]) -> int:
    from camshaft.models.config import resolve
    from camshaft.recipe.schema import Model

    return resolve(Model(**model), model["vocab_size"]).num_parameters()


def _write_corpus(small: Small, seed: int, steps: int) -> None:
    tree = small.tree
    length = tree["data"]["sequence_length"]
    tokens = 2 * length * small.samples * steps
    corpus.write(
        small.folder / "corpus", vocabulary=tree["model"]["vocab_size"], length=length, tokens=tokens, seed=seed
    )


def _fit(small: Small, sorted_: Sorted, resolved: Resolved, *, strict: bool) -> tuple[Small | None, Sequence[Problem]]:
    """``small`` in fp64, or as wide as its plugins let it; sizes that have no effect in it are taken out again.

    Unless ``strict``, options of the recipe that cannot be in it are taken out too, and told.
    """
    problems: Sequence[Problem] = ()
    refused = ""
    for compute in ("fp64", "fp32") if small.device == "cpu" else ("fp32",):
        attempt = widened(small, sorted_, compute)
        for _ in range(8):
            problems = _problems(attempt, sorted_)
            if not problems:
                return replace(attempt, notes=_notes(attempt, sorted_, refused)), ()
            cut = _without(attempt, problems, resolved, strict=strict)
            if cut is None:
                break
            attempt = cut
        refused = problems[0].message
    return None, problems


def _notes(small: Small, sorted_: Sorted, refused: str) -> tuple[str, ...]:
    """What of the recipe its small form leaves out."""
    found = [f"fp64, which these plugins do not have: {refused}"] if refused else []
    own = dict(small.own)
    if own and own != small.sections[sorted_.precision or ""]:
        text = ", ".join(f"{key} {value}" for key, value in own.items())
        found.append(f"the recipe's own precision ({text}): --own-precision looks at it, within wider bounds")
        if own.get("compute") in ("fp16", "fp8"):
            found.append(f"what {own['compute']} scales, which has no part in {small.compute}")
    return tuple(found)


def widened(small: Small, sorted_: Sorted, compute: str) -> Small:
    """``small`` with ``compute`` as the dtype of everything."""
    name = sorted_.precision
    if name is None or "compute" not in plugin_class(name).Options.model_fields:
        return replace(small, compute=compute)
    return replace(small, compute=compute, sections={**small.sections, name: {"compute": compute}})


def _problems(small: Small, sorted_: Sorted) -> Sequence[Problem]:
    corpus.write(small.folder / "corpus", vocabulary=8, length=4, tokens=64, seed=0)  # the check looks for a file
    try:
        small.all(sorted_, "fit")
    except RecipeError as error:
        return error.problems
    return ()


def _without(small: Small, problems: Sequence[Problem], resolved: Resolved, *, strict: bool) -> Small | None:
    """``small`` without the options that problems are about: those that this module set, or any unless ``strict``."""
    sections, notes = {name: dict(section) for name, section in small.sections.items()}, list(small.notes)
    taken_out = dict(small.taken_out)
    for problem in problems:
        words = problem.key.split(".")
        if len(words) < 3 or words[0] != "plugins" or words[2] not in sections.get(words[1], {}):
            continue
        given = words[2] in (resolved.tree["plugins"].get(words[1]) or {})
        if given and strict:
            continue
        if given:
            notes.append(f"{'.'.join(words[:3])}, which a small model on this machine cannot have: {problem.message}")
            taken_out[".".join(words[:3])] = resolved.tree["plugins"][words[1]][words[2]]
        del sections[words[1]][words[2]]
    if sections == small.sections:
        return None
    return replace(small, sections=sections, notes=tuple(notes), taken_out=taken_out)
