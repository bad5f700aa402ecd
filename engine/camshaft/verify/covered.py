"""What a proof says nothing about, in sentences: what was made small, left out, or is shared by both of its runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from camshaft.host import Host
from camshaft.verify.sorting import BESIDE, CHANGES_MODEL, TRAINING, Sorted, hooks_of

if TYPE_CHECKING:
    from camshaft.recipe import Checked, Resolved
    from camshaft.verify.record import Recording
    from camshaft.verify.shrink import Small

FOUND_STEPS = 4
"""Steps of a proof that ``train`` looks for."""


def of_recipe(resolved: Resolved, checked: Checked, small: Small, sorted_: Sorted, steps: int) -> tuple[str, ...]:
    """What of ``resolved`` the proof of ``small`` has not, or has otherwise."""
    return (
        "the recipe's data: documents of uneven lengths that a seed makes stand for them",
        _shared(checked, sorted_),
        *_in_both(resolved, sorted_),
        *_smaller(resolved, checked, small),
        *_options(resolved, small),
        *_phases(resolved, steps),
        "races that another speed of ranks or streams shows: each step is over before it is recorded",
        *small.notes,
        *(f"'{name}': {why}" for name, why in sorted_.left_out.items()),
        *_elsewhere(resolved, small, sorted_),
        *_not_found(small, steps),
    )


def _shared(checked: Checked, sorted_: Sorted) -> str:
    """What is the same code in both runs, so that a fault in it is in both."""
    makers = [
        name
        for name in sorted_.kept
        if name in checked.owners.get("build_model", ())
        or (name in checked.plans and CHANGES_MODEL in checked.plans[name].provides)
    ]
    whose = f" (of {' and '.join(repr(name) for name in makers)})" if makers else ""
    return f"what both runs share: the model{whose} and its loss, first values, the order of samples"


def _in_both(resolved: Resolved, sorted_: Sorted) -> Iterator[str]:
    """Hooks of plugins that the plain process has as well, beside those by which they are known."""
    from camshaft.verify import textbook

    host, beside = Host.of(resolved.recipe.plugins), BESIDE | {*TRAINING, "shapes", "misfits", "activations", "inert"}
    for name in sorted_.kept:
        told = {"around_step"} if textbook.find(name) else frozenset[str]()  # its formula says what a step makes
        more = hooks_of(host, name) - beside - told
        if more:
            yield f"what '{name}' does in {', '.join(sorted(more))}: both runs share it"


def _smaller(resolved: Resolved, checked: Checked, small: Small) -> Iterator[str]:
    assert checked.mesh is not None and checked.batch is not None and checked.config is not None
    for axis in checked.mesh.axes:
        proven = small.degrees.get(axis.name, 1)
        if proven == 1 < axis.degree:
            yield f"axis {axis.name} of {axis.degree} ranks: nothing that is compared works along it"
        elif proven < axis.degree:
            yield f"axis {axis.name} of {axis.degree} ranks: {proven} stand for them"
        elif axis.degree > 1 and axis.splits_batch and resolved.recipe.launch.processes == "auto":
            yield f"more than {proven} ranks along axis {axis.name}, which a run may have: launch.processes is auto"
    batch = checked.batch
    if (batch.micro_batch_size, batch.accumulation) != (small.micro, small.accumulation):
        yield (
            f"windows of {batch.accumulation} microbatches of {batch.micro_batch_size}: "
            f"{small.accumulation} of {small.micro} stand for them"
        )
    model = small.tree["model"]
    before, after = checked.config.num_hidden_layers, model["num_hidden_layers"]
    if before != after or checked.config.hidden_size != model["hidden_size"]:
        yield (
            f"{before} layers of width {checked.config.hidden_size}: {after} of width {model['hidden_size']}, with "
            f"samples of {small.tree['data']['sequence_length']} tokens, stand for them"
        )


def _options(resolved: Resolved, small: Small) -> Iterator[str]:
    """Sizes and lengths in the sections of plugins, which are cut to the small model and its few steps."""
    cut = [
        f"{name}.{key} {getattr(resolved.recipe.plugins[name], key)} as {value}"
        for name, section in small.sections.items()
        for key, value in section.items()
        if name in resolved.recipe.plugins
        and isinstance(value, int | float)
        and getattr(resolved.recipe.plugins[name], key, value) != value
    ]
    if cut:
        yield f"sizes and lengths as the recipe has them: {', '.join(cut)}"


def _phases(resolved: Resolved, steps: int) -> Iterator[str]:
    """What a run does beside the steps that are compared."""
    yield f"what only shows after {steps} steps"
    if resolved.recipe.batch.on_out_of_memory == "halve":
        yield "microbatches that are run again in halves (batch.on_out_of_memory)"


def _elsewhere(resolved: Resolved, small: Small, sorted_: Sorted) -> Iterator[str]:
    """Plugins that offer implementations for several devices, of which this one had its own."""
    offering = {name for name, _ in Host.of(resolved.recipe.plugins).implementations("kernels")}
    for name in sorted_.compared:
        if name in offering:
            yield f"what '{name}' chooses on another kind of device than '{small.device}'"


def _not_found(small: Small, steps: int) -> Iterator[str]:
    if steps != FOUND_STEPS or small.device != "cpu":
        yield f"`train` does not find this certificate: it looks for a proof of {FOUND_STEPS} steps on a CPU"


def without_gradient(plain: Recording) -> Iterator[str]:
    """Parameters that no step of the plain process had a gradient for."""
    names = [
        name for name in plain.start if plain.steps and all(step.gradients.get(name) is None for step in plain.steps)
    ]
    if names:
        count = f"{len(names)} of {len(plain.start)} parameters, which have no gradient in either run"
        yield f"the gradients of {count} (the first: '{names[0]}')"
