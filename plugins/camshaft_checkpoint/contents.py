"""What of a run goes into a checkpoint, under which names, and how it gets back. Tensors and JSON, nothing else.

Parameters and persistent buffers are ``model.<name>``, tied ones once, under their first name. Optimizer state is
``optimizer.<parameter>.<key>``, so that it does not depend on the order of parameters or on their groups. Random
number generators have no state to save: the engine derives them from seed and step.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

import camshaft
from camshaft.errors import CheckpointError

if TYPE_CHECKING:
    from camshaft.state import State

Description = dict[str, Any]


def model_tensors(model: Module) -> dict[str, Tensor]:
    """Live parameters and persistent buffers by name, without the ``model.`` of the checkpoint; tied ones once.

    Raises:
        CheckpointError: the module has extra state that is not a tensor.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the model's '{name}' is a {type(value).__name__}; only tensors can be saved")
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def optimizer_parameters(optimizer: Optimizer, model: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Any]]:
    """(name, parameter, group) of everything that the optimizer updates on this rank.

    Raises:
        CheckpointError: it updates a tensor that is no parameter of the model.
    """
    names = {id(tensor): name for name, tensor in model.items()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"group {number} of the optimizer holds a tensor {list(parameter.shape)} that is no parameter of"
                    " the model, so its state has no name to be saved under"
                )
            yield names[id(parameter)], parameter, group


def collect(state: State) -> tuple[dict[str, Tensor], Description]:
    """This rank's live tensors by checkpoint name, and its description of all else, copied.

    Raises:
        CheckpointError: something is neither a tensor nor JSON.
    """
    model = model_tensors(state.model)
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.items()}
    optimizer, moments = _describe_optimizer(state.optimizer, model)
    description = {
        "state": {
            "step": state.step,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
        },
        "optimizer": optimizer,
        "components": {name: dict(state_dict()) for name, state_dict, _ in state.components},
        "origin": origin(state),
    }
    try:
        copied: Description = json.loads(json.dumps(description))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"state of a plugin or of the optimizer is not JSON: {error}") from error
    return tensors | moments, copied


def _describe_optimizer(optimizer: Optimizer, model: Mapping[str, Tensor]) -> tuple[Description, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    table: dict[str, dict[str, str]] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter, _ in optimizer_parameters(optimizer, model):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                table.setdefault(name, {})[key] = f"optimizer.{name}.{key}"
                tensors[f"optimizer.{name}.{key}"] = value.detach()
            elif value is None or isinstance(value, bool | int | float | str):
                values.setdefault(name, {})[key] = value
            else:
                raise CheckpointError(
                    f"optimizer state '{key}' of '{name}' is a {type(value).__name__}; only tensors, numbers and"
                    " strings can be saved"
                )
    described = {
        "class": type(optimizer).__name__,
        "groups": describe_groups(optimizer, model),
        "tensors": table,
        "values": values,
    }
    return described, tensors


def describe_groups(optimizer: Optimizer, model: Mapping[str, Tensor]) -> list[Description]:
    """Hyperparameters and names of the parameters of each group."""
    groups: list[Description] = [{"options": _options(group), "parameters": []} for group in optimizer.param_groups]
    places = {id(group): number for number, group in enumerate(optimizer.param_groups)}
    for name, _, group in optimizer_parameters(optimizer, model):
        groups[places[id(group)]]["parameters"].append(name)
    return groups


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters of a group as JSON; a tensor (a learning rate on the device) becomes its number."""
    plain = {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
    return {
        key: value if isinstance(value, bool | int | float | str | None) else _listed(value)
        for key, value in plain.items()
        if key not in ("params", "param_names")
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else repr(value)


def merge(descriptions: Sequence[Description]) -> Description:
    """One document from every rank's description: rank 0's, with the optimizer parts of all ranks joined."""
    merged = descriptions[0]
    optimizer = merged["optimizer"]
    placed = {name for group in optimizer["groups"] for name in group["parameters"]}
    for other in (description["optimizer"] for description in descriptions[1:]):
        for kind in ("tensors", "values"):
            for name, entries in other[kind].items():
                optimizer[kind].setdefault(name, {}).update(entries)
        for group in other["groups"]:
            fresh = [name for name in group["parameters"] if name not in placed]
            if fresh:
                optimizer["groups"].append({"options": group["options"], "parameters": fresh})
                placed.update(fresh)
    return merged


def origin(state: State) -> dict[str, Any]:
    """Where a checkpoint comes from: for people, and for warnings when it is continued with something else."""
    recipe = json.dumps(state.world.recipe.model_dump(mode="json", exclude={"run"}), sort_keys=True)
    return {
        "camshaft": camshaft.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "world_size": state.world.world_size,
        "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
        "data_fingerprint": state.data_fingerprint,
    }
