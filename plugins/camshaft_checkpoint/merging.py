"""One document from what every rank says of itself, and back: optimizer, plugins' own state, stages. No torch.

Ranks along ``pp`` have other parameters, so what a plugin keeps of them may differ from stage to stage, and is kept for
each place on ``pp``. Along every other axis it is equal, as ``state_dict`` promises. A run with other places on ``pp``
is given the first place's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from camshaft.errors import CheckpointError

if TYPE_CHECKING:
    from camshaft.mesh import Mesh

Description = dict[str, Any]
BY_PLACE = "components_by_pp"
"""Key of the document: of plugins whose state differs along ``pp``, that of each place, in order."""


def merge(descriptions: Sequence[Description], places: Sequence[int]) -> Description:
    """Rank 0's description, with what it does not know from the other ranks; ``places`` tells where on ``pp`` each is.

    Raises:
        CheckpointError: a plugin's state differs between ranks of one place, or no rank has anything of a stage.
    """
    merged = descriptions[0]
    _check_stages([description.pop("stages") for description in descriptions])
    merged[BY_PLACE] = _by_place([description["components"] for description in descriptions], places)
    _join_optimizers(merged["optimizer"], [description["optimizer"] for description in descriptions[1:]])
    return merged


def components_of(document: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Each plugin's state for this rank: what was saved at its place, if there were as many places on ``pp`` then.

    Raises:
        KeyError, TypeError, ValueError, IndexError: the document is malformed.
    """
    components = dict(document["components"])
    for name, entries in dict(document.get(BY_PLACE, {})).items():
        if len(entries) == mesh.degree("pp"):
            components[name] = entries[mesh.place["pp"]]
    return components


def _check_stages(stages: Sequence[Sequence[int]]) -> None:
    present = {stage for of_rank in stages for stage in of_rank}
    missing = [str(stage) for stage in range(max(present, default=-1) + 1) if stage not in present]
    if missing:
        raise CheckpointError(
            f"no rank holds a parameter of pipeline stage {', '.join(missing)}, and there are {max(present) + 1}"
            " stages: a checkpoint without them could not be continued"
        )


def _by_place(components: Sequence[Mapping[str, Any]], places: Sequence[int]) -> dict[str, list[Any]]:
    """States of plugins whose places on ``pp`` differ, place by place."""
    first: dict[int, int] = {}
    for rank, place in enumerate(places):
        other = first.setdefault(place, rank)
        for name in components[0]:
            if _text(components[other][name]) != _text(components[rank][name]):
                raise CheckpointError(
                    f"state_dict of plugin '{name}' is not the same on ranks {other} and {rank}; it must be equal on"
                    " all ranks that have the same parameters"
                )
    heads = [components[first[place]] for place in sorted(first)]
    found = {name: [head[name] for head in heads] for name in components[0]}
    return {name: entries for name, entries in found.items() if len({_text(entry) for entry in entries}) > 1}


def _text(entries: Any) -> str:
    return json.dumps(entries, sort_keys=True)


def _join_optimizers(optimizer: Description, others: Sequence[Description]) -> None:
    """Add to rank 0's part what other ranks have: names of state, numbers, and members of groups."""
    placed = {name for group in optimizer["groups"] for name in group["parameters"]}
    for other in others:
        for kind in ("tensors", "values"):
            for name, entries in other[kind].items():
                optimizer[kind].setdefault(name, {}).update(entries)
        for group in other["groups"]:
            fresh = [name for name in group["parameters"] if name not in placed]
            if fresh:
                _group_like(optimizer["groups"], group["options"])["parameters"] += fresh
                placed.update(fresh)


def _group_like(groups: list[Description], options: Mapping[str, Any]) -> Description:
    """The group with these hyperparameters; a new one if there is none."""
    for group in groups:
        if group["options"] == options:
            return group
    groups.append({"options": options, "parameters": []})
    return groups[-1]
