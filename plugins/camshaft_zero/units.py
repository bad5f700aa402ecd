"""Which parameters travel together: buckets in the order of backward, or modules that are gathered as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch.nn import Module, ModuleList, Parameter

Named = tuple[str, Parameter, str]
"""Name, parameter, role."""
LARGE = 0.25
"""A module beside the blocks is a unit of its own if it holds this share of the largest block."""


@dataclass(slots=True)
class Group:
    """Parameters of one unit, and the modules whose forward needs them."""

    name: str
    named: list[Named]
    modules: list[Module] = field(default_factory=list)
    depth: int = 0
    """Units around it."""
    encloses: bool = False
    """Whether other units run inside its forward."""

    @property
    def elements(self) -> int:
        return sum(parameter.numel() for _, parameter, _ in self.named)


def buckets(named: Sequence[Named], limit: int, owners: Mapping[Parameter, list[Module]]) -> list[Group]:
    """Groups of at most ``limit`` elements (or one larger parameter), the last registered first, as backward goes."""
    groups: list[Group] = []
    for each in reversed(named):
        if not groups or groups[-1].elements + each[1].numel() > limit:
            groups.append(Group(f"bucket {len(groups)}", []))
        groups[-1].named.append(each)
    for group in groups:
        group.modules = list(dict.fromkeys(owner for _, parameter, _ in group.named for owner in owners[parameter]))
    return groups


def owners(model: Module) -> dict[Parameter, list[Module]]:
    """Modules that hold each parameter themselves; several for a tied one."""
    found: dict[Parameter, list[Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(parameter, []).append(module)
    return found


def by_module(model: Module, named: Sequence[Named], patterns: Sequence[str] | None, least: int) -> list[Group]:
    """Groups of modules in the order of registration, the model's own rest first; neighbours joined up to ``least``."""
    names = {module: name for name, module in model.named_modules()}
    sizes = {module: sum(p.numel() for p in module.parameters()) for module in names}
    chosen = {names[module] for module in _candidates(model, names, sizes, patterns)} | {""}
    holders = owners(model)
    groups: dict[str, Group] = {name: Group(name, []) for name in sorted(chosen, key=list(names.values()).index)}
    for each in named:
        around = [_enclosing(names[module], chosen) for module in holders[each[1]]]
        groups[_common(around, chosen)].named.append(each)
    modules = {name: module for module, name in names.items()}
    filled = [group for group in groups.values() if group.named]
    for group in filled:
        group.modules = [modules[group.name]]
        group.depth = sum(other is not group and _inside(group.name, other.name) for other in filled)
        group.encloses = any(other is not group and _inside(other.name, group.name) for other in filled)
    return _join(filled, least)


def _candidates(
    model: Module, names: Mapping[Module, str], sizes: Mapping[Module, int], patterns: Sequence[str] | None
) -> list[Module]:
    if patterns is not None:
        return [module for module, name in names.items() if any(fnmatchcase(name, each) for each in patterns)]
    lists = [module for module in names if isinstance(module, ModuleList)]
    outermost = [one for one in lists if not any(one is not other and one in set(other.modules()) for other in lists)]
    blocks = [block for one in outermost for block in one if sizes[block]]
    inside = {module for block in blocks for module in block.modules()}
    large = LARGE * max((sizes[block] for block in blocks), default=0)
    beside = [
        module
        for module in names
        if module not in inside and any(True for _ in module.parameters(recurse=False)) and sizes[module] >= large
    ]
    return blocks + [module for module in beside if module is not model and blocks]


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _enclosing(name: str, chosen: Iterable[str]) -> str:
    return max((each for each in chosen if _inside(name, each)), key=len)


def _common(names: Sequence[str], chosen: Iterable[str]) -> str:
    """The innermost chosen module around all of ``names``: where a tied parameter belongs."""
    return max((each for each in chosen if all(_inside(name, each) for name in names)), key=len)


def _join(groups: list[Group], least: int) -> list[Group]:
    joined: list[Group] = []
    for group in groups:
        last = joined[-1] if joined else None
        beside = last is not None and _parent(last.name) == _parent(group.name)
        if last is not None and beside and not (last.encloses or group.encloses) and last.elements < least:
            last.named += group.named
            last.modules += group.modules
        else:
            joined.append(group)
    return joined


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
