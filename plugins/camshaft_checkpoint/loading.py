"""Loading: compare with the model, complain before anything is written, then fill tensors in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from camshaft.errors import CheckpointError
from camshaft_checkpoint import contents
from camshaft_checkpoint.choosing import Choice, listed
from camshaft_checkpoint.index import Index, Stored
from camshaft_checkpoint.planning import read_into
from camshaft_checkpoint.ranks import Ranks
from camshaft_checkpoint.storage import DTYPES, Reader

if TYPE_CHECKING:
    from camshaft.state import State

_log = logging.getLogger(__name__)
_NO_MATTER = {"lr", "initial_lr", "foreach", "fused", "capturable", "differentiable"}
"""Hyperparameters that change in every step, or only say how the same numbers are computed."""


@dataclass(slots=True)
class Targets:
    """Where the tensors of a checkpoint go, and what does not fit."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    created: list[tuple[Tensor, str, Any]] = field(default_factory=list)
    """(parameter, key, value) of optimizer state that does not exist yet."""


def restore(state: State, ranks: Ranks, choice: Choice) -> None:
    """Fill model, optimizer, counters and plugins' own state from a verified checkpoint.

    Raises:
        CheckpointError: names, shapes, dtypes or the optimizer do not fit; nothing has been written then.
        MachineError: reading failed after the checks; the weights are not usable.
    """
    counters, components = ranks.everywhere(lambda: _parts(choice))
    targets = ranks.everywhere(lambda: find_targets(state, choice.index))
    _complain(ranks, choice, targets)
    reader = Reader(choice.folder, choice.index)
    ranks.everywhere(lambda: read_into(targets.tensors, reader, ranks.is_main))
    for parameter, key, value in targets.created:
        state.optimizer.state[parameter][key] = value
    state.step, state.consumed_samples, state.consumed_tokens = counters
    _restore_components(state, components)
    if ranks.is_main:
        _warn_differences(state, choice)


def _parts(choice: Choice) -> tuple[tuple[int, int, int], Mapping[str, Any]]:
    document = choice.index.document
    try:
        counters = document["state"]
        step, samples, tokens = (int(counters[key]) for key in ("step", "consumed_samples", "consumed_tokens"))
        components: Mapping[str, Any] = dict(document["components"])
        optimizer = document["optimizer"]
        if not all(isinstance(optimizer[key], dict) for key in ("tensors", "values")) or "class" not in optimizer:
            raise ValueError("the optimizer's part is incomplete")
        if step != choice.manifest.step:
            raise ValueError(f"index is of step {step}, manifest of step {choice.manifest.step}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{choice.folder}: malformed index: {type(error).__name__}: {error}") from error
    return (step, samples, tokens), components


def find_targets(state: State, index: Index) -> Targets:
    """This rank's live tensors, and new optimizer state where there is none yet, by checkpoint name."""
    targets = Targets()
    model = contents.model_tensors(state.model)
    for name, tensor in model.items():
        _add(targets, index, f"model.{name}", tensor.detach())
    optimizer = index.document["optimizer"]
    if optimizer["class"] != type(state.optimizer).__name__:
        targets.faults.append(
            f"the optimizer was {optimizer['class']} and is {type(state.optimizer).__name__}, whose state differs"
        )
        return targets
    for name, parameter, group in contents.optimizer_parameters(state.optimizer, model):
        _add_moments(targets, state, index, name, parameter, group)
    return targets


def _add_moments(
    targets: Targets, state: State, index: Index, name: str, parameter: Tensor, group: Mapping[str, Any]
) -> None:
    optimizer = index.document["optimizer"]
    existing = state.optimizer.state.get(parameter, {})
    saved = optimizer["tensors"].get(name, {})
    for key in {**{key: 0 for key, value in existing.items() if isinstance(value, Tensor)}, **saved}:
        full = saved.get(key, f"optimizer.{name}.{key}")
        target = existing.get(key)
        if not isinstance(target, Tensor) and full in index.tensors:
            target = empty_state(index.tensors[full], key, parameter, group)
            if target is None:
                targets.faults.append(f"{full}: is not shaped like its parameter, which is divided over ranks")
                continue
            targets.created.append((parameter, key, target))
        _add(targets, index, full, target)
    targets.created += [(parameter, key, value) for key, value in optimizer["values"].get(name, {}).items()]


def empty_state(stored: Stored, key: str, parameter: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    """Room for optimizer state: laid out like its parameter, or on the device where the optimizer wants it.

    Optimizers keep ``step`` on the CPU unless they are fused or capturable, as in ``Optimizer.load_state_dict``. None
    for state that is not shaped like its parameter, when that is divided: nothing says how to divide it.
    """
    dtype = DTYPES[stored.dtype]
    if key != "step" and stored.shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if stored.shape and hasattr(parameter, "placements"):
        return None
    host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.empty(stored.shape, dtype=dtype, device="cpu" if host else parameter.device)


def _add(targets: Targets, index: Index, name: str, tensor: Tensor | None) -> None:
    stored = index.tensors.get(name)
    if stored is None or tensor is None:
        targets.faults.append(f"{name}: not in the checkpoint")
        return
    targets.tensors[name] = tensor
    if stored.shape != tuple(tensor.shape):
        targets.faults.append(f"{name}: shape {list(stored.shape)} in the checkpoint, {list(tensor.shape)} now")
    elif DTYPES[stored.dtype] != tensor.dtype:
        targets.faults.append(f"{name}: {DTYPES[stored.dtype]} in the checkpoint, {tensor.dtype} now")


def _complain(ranks: Ranks, choice: Choice, targets: Targets) -> None:
    """Raise on every rank if any rank has a fault, or if no rank has a place for something that was saved."""
    shared = ranks.share((targets.faults, sorted(targets.tensors)))
    faults = list(dict.fromkeys(fault for faults, _ in shared for fault in faults))
    placed = {name for _, names in shared for name in names}
    if not any(fault.startswith("the optimizer was") for fault in faults):
        faults += [
            f"{name}: in the checkpoint, and has no place now" for name in choice.index.tensors if name not in placed
        ]
    if faults:
        raise CheckpointError(
            f"{choice.folder} does not fit this recipe, and nothing was loaded: {listed(faults)}. Fix: use the recipe"
            " that it was written with (resolved.yaml in its run), or another run.dir to start anew"
        )


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
    described = contents.describe_groups(state.optimizer, contents.model_tensors(state.model))
    for group in described:
        for name in group["parameters"]:
            old = saved.get(name, {})
            for key, value in group["options"].items():
                if key in old and key not in _NO_MATTER and old[key] != value:
                    change = (key, str(old[key]), str(value))
                    found[change] = found.get(change, 0) + 1
    return [f"{key} was {old} and is {new} for {count} parameter(s)" for (key, old, new), count in found.items()]
