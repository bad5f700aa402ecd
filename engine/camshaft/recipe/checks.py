"""What a recipe of the right types can still get wrong: batch algebra, sizes, data, plugins against one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from camshaft import claims, halving, host
from camshaft.claims import Plan, PlanContext
from camshaft.errors import PluginError, Problem, RecipeError
from camshaft.mesh import MeshShape, stated_data_parallel
from camshaft.plugin import Plugin
from camshaft.recipe.schema import Recipe
from camshaft.state import BatchPlan

if TYPE_CHECKING:
    from camshaft.models.config import ModelConfig
    from camshaft.recipe.resolved import Resolved

EVERY_SECTION = frozenset(Recipe.model_fields)


@dataclass(slots=True)
class Checked:
    """What the checks found out. Fields are None, or empty, where a problem made them unknowable."""

    mesh: MeshShape | None = None
    batch: BatchPlan | None = None
    """None too when the recipe leaves the number of processes open."""
    config: ModelConfig | None = None
    plans: dict[str, Plan] = field(default_factory=dict)
    """Plugin to its plan, in recipe order."""
    owners: dict[str, list[str]] = field(default_factory=dict)
    """Slot to the plugins that own it."""
    context: PlanContext | None = None
    """What plugins were asked with; None where they were not asked."""
    problems: tuple[Problem, ...] = ()

    def require(self) -> Checked:
        """Itself, when there is no problem.

        Raises:
            RecipeError: with every problem.
        """
        if self.problems:
            raise RecipeError(self.problems)
        return self


def check(
    resolved: Resolved,
    world_size: int | None = None,
    device: str = "any",
    *,
    sound: frozenset[str] = EVERY_SECTION,
    observers: Mapping[str, Plugin] | None = None,
) -> Checked:
    """Every check that needs neither torch nor a process group.

    Without ``world_size`` the recipe's ``launch.processes`` counts; when that is ``auto`` too, nothing that depends on
    the number of processes is checked. ``sound`` names the sections whose values can be believed; a check that needs
    another one is left out. ``observers``: plugins that will be beside the recipe's own; they are asked nothing, but
    may build the model.
    """
    run = _Run(resolved, sound)
    processes = world_size or _processes(resolved.recipe)
    run.need({"parallel"}, lambda: run.set_mesh(processes))
    run.need({"batch", "parallel"}, lambda: run.set_batch(processes))
    run.need({"training"}, lambda: run.problems.extend(_stop(resolved.recipe)))
    run.need({"training", "data"}, lambda: run.problems.extend(_evaluation(resolved.recipe)))
    run.need({"model"}, run.set_model)
    run.need({"run", "data"}, lambda: run.problems.extend(_places(resolved.recipe)))
    run.need({"tokenizer", "data"}, run.check_data)
    run.set_plugins(device, observers or {})
    unique = dict.fromkeys(resolved.placed(problem) for problem in run.problems)
    run.checked.problems = tuple(unique)
    return run.checked


class _Run:
    """One run of the checks: each adds to ``problems`` and fills ``checked``."""

    def __init__(self, resolved: Resolved, sound: frozenset[str]) -> None:
        self.resolved, self.recipe, self.sound = resolved, concrete(resolved.recipe), sound
        self.problems: list[Problem] = []
        self.checked = Checked()

    def need(self, sections: set[str], step: Callable[[], None]) -> None:
        if sections <= self.sound:
            with self.collect():
                step()

    @contextmanager
    def collect(self) -> Iterator[None]:
        try:
            yield
        except RecipeError as error:
            self.problems += error.problems

    def set_mesh(self, processes: int | None) -> None:
        self.checked.mesh = MeshShape.of(self.recipe.parallel, processes or smallest_world(self.recipe))

    def set_batch(self, processes: int | None) -> None:
        if self.resolved.recipe.batch.micro_batch_size == AUTO and self.recipe.batch.gradient_accumulation_steps:
            message = "is given, and follows from batch.micro_batch_size, which is auto"
            fix = "remove it, or give micro_batch_size"
            raise RecipeError(Problem(message, key="batch.gradient_accumulation_steps", fix=fix))
        if self.checked.mesh is not None and (processes or stated_data_parallel(self.recipe.parallel)):
            self.checked.batch = batch_plan(self.recipe, self.checked.mesh)
        elif processes is None:
            _whole(self.recipe, 1)

    def set_model(self) -> None:
        from camshaft import data
        from camshaft.models.config import resolve

        known = {"tokenizer", "data"} <= self.sound
        # Without a tokenizer to believe in, any vocabulary that fits lets the rest of the model be checked.
        vocab_size = data.vocab_size(self.resolved) if known else self.recipe.model.vocab_size or 1
        config = resolve(self.recipe.model, vocab_size)
        self.checked.config = config
        length = self.recipe.data.sequence_length
        if length > config.max_position_embeddings:
            self.problems.append(
                Problem(
                    f"samples of {length} tokens, but the model has {config.max_position_embeddings} positions",
                    key="data.sequence_length",
                    fix="shorten it, or raise model.max_position_embeddings",
                )
            )

    def check_data(self) -> None:
        from camshaft import data

        self.problems += data.check(self.resolved)

    def set_plugins(self, device: str, observers: Mapping[str, Plugin]) -> None:
        """Slots, plans and claims. While sections are faulty, only what their plugins' classes say can be judged."""
        whole = "plugins" in self.sound
        plugins = host.Host.of(self.recipe.plugins)
        self.checked.owners = plugins.owners()
        slots = host.slot_problems(self.checked.owners)
        self.problems += [problem for problem in slots if whole or problem.key != "plugins"]
        if self.checked.mesh is None or not whole or not self.sound >= EVERY_SECTION - {"name", "schema_version"}:
            return
        config = self.checked.config if _builds_decoder({**plugins.plugins, **observers}) else None
        context = PlanContext(self.recipe, self.checked.mesh, tuple(self.recipe.plugins), device, config)
        self.checked.context = context
        for name, plan in plugins.implementations("plan"):
            with self.collect():
                self.checked.plans[name] = _a_plan(name, plan(context))
        self.problems += claims.check(self.checked.plans, self.checked.mesh, self.checked.owners)
        if self.recipe.batch.on_out_of_memory == "halve":
            self.problems += halving.problems(self.checked.plans, self.checked.owners, context)
        if not self.problems:
            from camshaft import holding  # it needs the model's sections, which need this package

            self.problems += holding.misfits(self.checked, plugins)


def _builds_decoder(plugins: Mapping[str, Plugin]) -> bool:
    """Whether the model will be the built-in decoder of the recipe's sizes.

    A plugin that offers kernels puts them in where the architecture is rewritten, and leaves that as it is.
    """
    return not any(
        hasattr(each, "build_model") or (hasattr(each, "rewrite") and not hasattr(each, "kernels"))
        for each in plugins.values()
    )


def _a_plan(name: str, found: object) -> Plan:
    if not isinstance(found, Plan):
        raise PluginError(name, "plan", f"returned {type(found).__name__}; it must return a Plan on every path")
    return found


def _processes(recipe: Recipe) -> int | None:
    """The number of processes, as far as the recipe alone says it."""
    return None if recipe.launch.processes == "auto" else recipe.launch.processes


def smallest_world(recipe: Recipe) -> int:
    """Processes that the degrees need at least."""
    parallel = recipe.parallel
    halves = (parallel.data_parallel_replicate or 1) * (parallel.data_parallel_shard or 1)
    data = stated_data_parallel(parallel) or halves
    return data * parallel.pipeline_parallel * parallel.context_parallel * parallel.tensor_parallel


def batch_plan(recipe: Recipe, mesh: MeshShape) -> BatchPlan:
    """Batch algebra: global = micro x accumulation x batch degree.

    Raises:
        RecipeError: the global batch does not divide, or a given accumulation does not fit; shows the whole product.
    """
    batch, degree, micro = recipe.batch, mesh.batch_degree, micro_batch_size(recipe)
    accumulation = _whole(recipe, degree)
    given = batch.gradient_accumulation_steps
    if given is not None and given != accumulation:
        product = micro * given * degree
        raise RecipeError(
            Problem(
                f"micro {micro} x accumulation {given} x {degree} batch-parallel rank(s) = {product},"
                f" but global_batch_size is {batch.global_batch_size}",
                key="batch.gradient_accumulation_steps",
                fix=f"set it to {accumulation}, or remove it: it is derived",
            )
        )
    return BatchPlan(micro, batch.global_batch_size, accumulation)


AUTO = "auto"


def micro_batch_size(recipe: Recipe) -> int:
    """The recipe's, or 1 where it is to be found: what every batch can be divided into."""
    given = recipe.batch.micro_batch_size
    return given if isinstance(given, int) else 1


def concrete(recipe: Recipe) -> Recipe:
    """``recipe`` with a micro batch of 1 in place of ``auto``."""
    if recipe.batch.micro_batch_size != AUTO:
        return recipe
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_batch_size": 1})})


def _whole(recipe: Recipe, degree: int) -> int:
    """Accumulation steps, when they come out whole."""
    micro, total = micro_batch_size(recipe), recipe.batch.global_batch_size
    if total % (micro * degree):
        low = max(1, total // (micro * degree)) * micro * degree
        near = {low, low + micro * degree} if total > low else {low}
        raise RecipeError(
            Problem(
                f"global_batch_size {total} is not micro {micro} x accumulation x {degree} batch-parallel rank(s):"
                f" {total} / ({micro} x {degree}) is not whole",
                key="batch.global_batch_size",
                fix=f"set it to {' or '.join(str(size) for size in sorted(near))}, or change micro_batch_size",
            )
        )
    return total // (micro * degree)


def _evaluation(recipe: Recipe) -> list[Problem]:
    training, data = recipe.training, recipe.data
    if training.eval_every is None or data.validation is not None or data.validation_fraction > 0:
        return []
    message = "there is nothing to evaluate on: data.validation is not set and data.validation_fraction is 0"
    return [Problem(message, key="training.eval_every", fix="hold something out, or remove training.eval_every")]


def _places(recipe: Recipe) -> list[Problem]:
    """Files where there are to be folders."""
    places = {"run.root": recipe.run.root, "run.dir": recipe.run.dir, "data.cache_dir": recipe.data.cache_dir}
    return [
        Problem(f"'{path}' is a file, and a folder is to be there", key=key, fix="name another place")
        for key, path in places.items()
        if path is not None and os.path.isfile(path)  # noqa: PTH113  (any text)
    ]


def _stop(recipe: Recipe) -> list[Problem]:
    training = recipe.training
    names = ("max_steps", "max_epochs", "max_tokens")
    given = [name for name in names if getattr(training, name) is not None]
    if len(given) == 1:
        return []
    if given:
        message = f"{' and '.join(given)} are both given: a run has one end"
        return [Problem(message, key=f"training.{given[-1]}", fix="keep one of them")]
    return [Problem("a run needs an end", key="training", fix=f"set one of {', '.join(names)}")]


def derived(recipe: Recipe, world_size: int | None) -> Mapping[str, tuple[Any, str]]:
    """Key to (value, how) of what the recipe leaves to be derived, as far as the number of processes is known."""
    processes = world_size or _processes(recipe)
    found: dict[str, tuple[Any, str]] = {}
    if processes is None:
        return found
    try:
        mesh = MeshShape.of(recipe.parallel, processes)
        plan = batch_plan(recipe, mesh)
    except RecipeError:
        return found
    if recipe.parallel.data_parallel == "auto":
        found["parallel.data_parallel"] = (mesh["dp"].degree, f"derived from {processes} process(es)")
    for axis in (mesh[name] for name in mesh.members("dp")):
        if getattr(recipe.parallel, axis.key) is None:
            found[f"parallel.{axis.key}"] = (axis.degree, f"derived: {mesh['dp'].degree} data-parallel ranks")
    if recipe.batch.gradient_accumulation_steps is None and recipe.batch.micro_batch_size != AUTO:
        how = f"derived: {plan.global_batch_size} / ({plan.micro_batch_size} x {mesh.batch_degree})"
        found["batch.gradient_accumulation_steps"] = (plan.accumulation, how)
    return found
