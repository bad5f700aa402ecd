"""What of a run goes into a checkpoint, under which names, and how it gets back. Tensors and JSON, nothing else.

Parameters and persistent buffers are ``model.<name>``, tied ones once, under their first name. Optimizer state is
``optimizer.<parameter>.<key>``, so that it does not depend on the order of parameters or on their groups. Random
number generators have no state to save: the engine derives them from seed and step.

The names do not depend on who holds what either: ``model.<name>`` are the master weights where there are any, and what
is divided is saved as boxes of the whole parameter. So each layout reads what any other wrote.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import camshaft
from camshaft.errors import CheckpointError
from camshaft.parts import Part
from camshaft_checkpoint import held
from camshaft_checkpoint.held import Held

if TYPE_CHECKING:
    from camshaft.state import State

Description = dict[str, Any]


def optimizer_parts(state: State) -> Iterator[tuple[Part, Mapping[str, Any], int]]:
    """(part, group, number of the group) of everything that the optimizer updates on this rank.

    Raises:
        CheckpointError: it updates a tensor that holds no parameter of the model.
    """
    parts = {id(part.tensor): part for part in state.world.parts}
    for number, group in enumerate(state.optimizer.param_groups):
        for tensor in group["params"]:
            if id(tensor) not in parts:
                raise CheckpointError(
                    f"group {number} of the optimizer holds a tensor {list(tensor.shape)} that is no parameter of"
                    " the model, so its state has no name to be saved under"
                )
            yield parts[id(tensor)], group, number


def collect(state: State, apart: Iterable[str]) -> tuple[dict[str, Held], Description]:
    """What this rank holds by checkpoint name, live, and its description of all else, copied.

    ``apart`` are the parameters that any rank holds elsewhere than in the model.

    Raises:
        CheckpointError: something is neither a tensor nor JSON, or optimizer state cannot be divided as its tensor.
    """
    tensors = {f"model.{name}": tensor for name, tensor in held.weights(state, apart).items()}
    optimizer, moments = _describe_optimizer(state)
    description = {
        "state": {
            "step": state.step,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
        },
        "optimizer": optimizer,
        "components": {name: dict(state_dict()) for name, state_dict, _ in state.components},
        "stages": sorted(set(state.world.stages.values())),
        "origin": origin(state),
    }
    try:
        copied: Description = json.loads(json.dumps(description))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"state of a plugin or of the optimizer is not JSON: {error}") from error
    return tensors | moments, copied


def _describe_optimizer(state: State) -> tuple[Description, dict[str, Held]]:
    tensors: dict[str, dict[str, Held]] = {}
    values: dict[str, dict[str, Any]] = {}
    for part, _, _ in optimizer_parts(state):
        for key, value in state.optimizer.state.get(part.tensor, {}).items():
            if isinstance(value, Tensor):
                _add_state(tensors.setdefault(key, {}), part, key, value)
            elif value is None or isinstance(value, bool | int | float | str):
                for piece in part.pieces:
                    values.setdefault(piece.name, {})[key] = value
            else:
                raise CheckpointError(
                    f"optimizer state '{key}' of '{_title(part)}' is a {type(value).__name__}; only tensors, numbers"
                    " and strings can be saved"
                )
    names = [(name, key) for key, by_name in tensors.items() for name in by_name]
    table: dict[str, dict[str, str]] = {}
    for name, key in names:
        table.setdefault(name, {})[key] = f"optimizer.{name}.{key}"
    described = {
        "class": type(state.optimizer).__name__,
        "groups": describe_groups(state),
        "tensors": table,
        "values": values,
    }
    return described, {table[name][key]: tensors[key][name] for name, key in names}


def _add_state(found: dict[str, Held], part: Part, key: str, value: Tensor) -> None:
    """One value an element lies like the part's tensor; a single one, the count of steps, is every piece's."""
    if value.shape == part.tensor.shape:
        held.spread(found, part, value)
    elif not value.ndim or held.undivided(part):
        found.update((piece.name, value) for piece in part.pieces)
    else:
        raise CheckpointError(
            f"optimizer state '{key}' of '{_title(part)}' has shape {list(value.shape)}, which is neither one value"
            " nor one an element; it cannot be saved where parameters are divided"
        )


def _title(part: Part) -> str:
    return ", ".join(dict.fromkeys(piece.name for piece in part.pieces)) or "a part without parameters"


def describe_groups(state: State) -> list[Description]:
    """Hyperparameters and names of the parameters of each group."""
    names: list[dict[str, None]] = [{} for _ in state.optimizer.param_groups]
    for part, _, number in optimizer_parts(state):
        names[number] |= dict.fromkeys(piece.name for piece in part.pieces)
    return [
        {"options": _options(group), "parameters": list(members)}
        for group, members in zip(state.optimizer.param_groups, names, strict=True)
    ]


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
