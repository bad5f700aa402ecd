"""Loading: compare with the model, complain before anything is written, then fill tensors in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from camshaft.errors import CheckpointError
from camshaft_checkpoint import contents, held, merging, moments
from camshaft_checkpoint.choosing import Choice, listed
from camshaft_checkpoint.planning import read_into
from camshaft_checkpoint.ranks import Ranks
from camshaft_checkpoint.storage import Reader
from camshaft_checkpoint.targets import Conversion, Targets, tell_conversions

if TYPE_CHECKING:
    from camshaft.state import State

_log = logging.getLogger(__name__)
_NO_MATTER = {"lr", "initial_lr", "foreach", "fused", "capturable", "differentiable"}
"""Hyperparameters that change in every step, or only say how the same numbers are computed."""


def restore(state: State, ranks: Ranks, choice: Choice) -> None:
    """Fill model, optimizer, counters and plugins' own state from a verified checkpoint.

    Raises:
        CheckpointError: names, shapes, dtypes or the optimizer do not fit; nothing has been written then.
        MachineError: reading failed after the checks; the weights are not usable.
    """
    counters, components = ranks.everywhere(lambda: _parts(state, choice))
    reader = Reader(choice.folder, choice.index)
    apart = ranks.union(held.apart(state))
    targets = ranks.everywhere(lambda: find_targets(state, reader, apart))
    converted = _complain(ranks, choice, targets)
    ranks.everywhere(lambda: read_into(targets.tensors, reader, ranks.is_main))
    for tensor, key, value in targets.created:
        state.optimizer.state[tensor][key] = value
    state.step, state.consumed_samples, state.consumed_tokens = counters
    _restore_components(state, components)
    if ranks.is_main:
        tell_conversions(choice.folder.name, converted)
        _warn_differences(state, choice)


def _parts(state: State, choice: Choice) -> tuple[tuple[int, int, int], Mapping[str, Any]]:
    document = choice.index.document
    try:
        counters = document["state"]
        step, samples, tokens = (int(counters[key]) for key in ("step", "consumed_samples", "consumed_tokens"))
        components = merging.components_of(document, state.world.mesh)
        optimizer = document["optimizer"]
        if not all(isinstance(optimizer[key], dict) for key in ("tensors", "values")) or "class" not in optimizer:
            raise ValueError("the optimizer's part is incomplete")
        if step != choice.manifest.step:
            raise ValueError(f"index is of step {step}, manifest of step {choice.manifest.step}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{choice.folder}: malformed index: {type(error).__name__}: {error}") from error
    return (step, samples, tokens), components


def find_targets(state: State, reader: Reader, apart: set[str]) -> Targets:
    """Where this rank's share goes: live tensors, and new optimizer state where there is none yet.

    ``apart`` are the parameters that any rank holds elsewhere than in the model. Buffers of several parameters are
    divided here where the saved state demands it, which changes no number.
    """
    targets = Targets(reader.index)
    parameters = state.named_parameters()
    for name, target in held.weights(state, apart).items():
        targets.add(f"model.{name}", target, converts=name in parameters)
    before = reader.index.document["optimizer"]["class"]
    if before != type(state.optimizer).__name__:
        targets.faults.append(
            f"the optimizer was {before} and is {type(state.optimizer).__name__}, whose state differs"
        )
        return targets
    saved = moments.Saved(reader.index)
    if apart:
        saved.read_numbers(reader, parameters)
        moments.keep_apart(state, saved)
    moments.find(targets, state, saved)
    return targets


def _complain(ranks: Ranks, choice: Choice, targets: Targets) -> dict[str, Conversion]:
    """Raise on every rank if any rank has a fault, or if no rank has a place for something that was saved.

    Otherwise return what any rank reads into another dtype.
    """
    shared = ranks.share((targets.faults, targets.names, targets.converted))
    faults = list(dict.fromkeys(fault for faults, _, _ in shared for fault in faults))
    placed = {name for _, names, _ in shared for name in names}
    if not any(fault.startswith("the optimizer was") for fault in faults):
        missing = choice.index.tensors.keys() - placed - moments.needless(choice.index)
        faults += [f"{name}: in the checkpoint, and has no place now" for name in sorted(missing)]
    if faults:
        raise CheckpointError(
            f"{choice.folder} does not fit this recipe, and nothing was loaded: {listed(faults)}. Fix: use the recipe"
            " that it was written with (resolved.yaml in its run), or another run.dir to start anew"
        )
    return {name: pair for _, _, converted in shared for name, pair in converted.items()}


def _restore_components(state: State, components: Mapping[str, Any]) -> None:
    present = {name for name, _, _ in state.components}
    for name, _, load_state_dict in state.components:
        if name in components:
            load_state_dict(components[name])
    for name in sorted(components.keys() - present):
        _log.warning("the checkpoint holds state of plugin '%s', which is not enabled now; it is not used", name)


def _warn_differences(state: State, choice: Choice) -> None:
    saved, now = choice.index.document.get("origin", {}), contents.origin(state)
    before, after = saved.get("data_fingerprint"), now["data_fingerprint"]
    if before is not None and after is not None and before != after:
        _log.warning(
            "DATA CHANGED since %s was written (fingerprint %s..., now %s...): samples may be seen twice or never",
            choice.folder.name, str(before)[:12], str(after)[:12],
        )  # fmt: skip
    for line in changed_options(state, choice.index.document["optimizer"]["groups"]):
        _log.warning("since %s was written: %s; the recipe's value is used", choice.folder.name, line)
    if saved.get("world_size") != now["world_size"]:
        _log.info("written by %s rank(s), continued on %d", saved.get("world_size"), now["world_size"])


def changed_options(state: State, groups: list[Mapping[str, Any]]) -> list[str]:
    """Hyperparameters of the optimizer that differ from the saved ones, compared parameter by parameter."""
    saved = {name: group["options"] for group in groups for name in group["parameters"]}
    found: dict[tuple[str, str, str], int] = {}
    for group in contents.describe_groups(state):
        for name in group["parameters"]:
            old = saved.get(name, {})
            for key, value in group["options"].items():
                if key in old and key not in _NO_MATTER and old[key] != value:
                    change = (key, str(old[key]), str(value))
                    found[change] = found.get(change, 0) + 1
    return [f"{key} was {old} and is {new} for {count} parameter(s)" for (key, old, new), count in found.items()]
