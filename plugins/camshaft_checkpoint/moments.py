"""Where the optimizer's state of a checkpoint goes: into that of whole parameters, or into that of flat buffers.

One buffer has one count of steps, and state for all of its elements or for none. Parameters whose saved state differs
from that of the others in this (one that got its first gradient late, or never) are given buffers of their own first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from camshaft.parts import Part
from camshaft_checkpoint import contents, held
from camshaft_checkpoint.held import Held
from camshaft_checkpoint.index import Index, Stored
from camshaft_checkpoint.planning import read_into
from camshaft_checkpoint.storage import DTYPES, Reader
from camshaft_checkpoint.targets import FLOATING, Targets

if TYPE_CHECKING:
    from camshaft.state import State


class Saved:
    """The optimizer's part of a checkpoint."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.tensors: Mapping[str, Mapping[str, str]] = index.document["optimizer"]["tensors"]
        self.values: Mapping[str, Mapping[str, Any]] = index.document["optimizer"]["values"]
        self.singles = self._singles()
        """Keys of state that is one number a parameter, whatever its shape: the count of steps."""
        self.numbers: dict[str, Tensor] = {}
        """Those numbers by checkpoint name, once read."""

    def read_numbers(self, reader: Reader, names: Iterable[str]) -> None:
        """Read the single numbers of this rank's parameters.

        From them alone, and so alike, ranks with the same parameters decide what they have to keep apart.
        """
        tables = [self.tensors.get(name, {}) for name in names]
        wanted = [full for keys in tables for key, full in keys.items() if key in self.singles]
        stored = {full: self.index.tensors[full] for full in wanted if full in self.index.tensors}
        self.numbers = {
            full: torch.empty((), dtype=DTYPES[each.dtype]) for full, each in stored.items() if each.shape == ()
        }
        read_into(self.numbers, reader, is_main=True)

    def full(self, name: str, key: str) -> str:
        """Checkpoint name of a parameter's state."""
        return self.tensors.get(name, {}).get(key, f"optimizer.{name}.{key}")

    def sameness(self, name: str) -> Hashable:
        """What must be equal for two parameters to share a buffer: which state there is, and all single numbers."""
        keys = self.tensors.get(name, {})
        numbers = [(key, number.item()) for key, full in keys.items() if (number := self.numbers.get(full)) is not None]
        return tuple(sorted(keys)), tuple(sorted(numbers)), tuple(sorted(self.values.get(name, {}).items()))

    def follows(self, name: str, stored: Stored) -> bool:
        """Whether state of ``name`` has the dtype that the parameter was saved in."""
        parameter = self.index.tensors.get(f"model.{name}")
        return parameter is not None and parameter.dtype == stored.dtype

    def _singles(self) -> frozenset[str]:
        """A key is known by parameters that have dimensions; where there is none, only ``step`` is a single number."""
        found = {"step"}
        for name, keys in self.tensors.items():
            parameter = self.index.tensors.get(f"model.{name}")
            if parameter is not None and parameter.shape:
                found |= {
                    key
                    for key, full in keys.items()
                    if full in self.index.tensors and not self.index.tensors[full].shape
                }
        return frozenset(found)


def needless(index: Index) -> set[str]:
    """State of parameters without elements: some layouts update them, others leave them out."""
    saved = Saved(index)
    shapes = {name: index.tensors[f"model.{name}"].shape for name in saved.tensors if f"model.{name}" in index.tensors}
    return {full for name, shape in shapes.items() if 0 in shape for full in saved.tensors[name].values()}


def keep_apart(state: State, saved: Saved) -> None:
    """Divide buffers in which parameters lie whose saved state is not of one kind.

    The same on all ranks that have the same parameters, so on all that hold pieces of one buffer.
    """
    roles = state.world.roles
    trained = [name for name, parameter in state.model.named_parameters() if parameter.requires_grad]
    kinds = {name: saved.sameness(name) for name in trained}
    counts: dict[str, Counter[Hashable]] = {}
    for name in trained:
        counts.setdefault(roles[name], Counter())[kinds[name]] += 1
    usual = {role: count.most_common(1)[0][0] for role, count in counts.items()}
    unusual = [name for name in trained if kinds[name] != usual[roles[name]]]
    if unusual:
        state.world.parts.isolate(unusual, state.optimizer)


def find(targets: Targets, state: State, saved: Saved) -> None:
    """Add the optimizer's state of this rank to ``targets``, and make what does not exist yet."""
    for part, group, _ in contents.optimizer_parts(state):
        existing = state.optimizer.state.get(part.tensor, {})
        if part.whole:
            _find_whole(targets, saved, part, group, existing)
        elif part.pieces:
            _find_divided(targets, saved, part, group, existing)


def _keys(existing: Mapping[str, Any], saved: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys([*(key for key, value in existing.items() if isinstance(value, Tensor)), *saved]))


def _find_whole(
    targets: Targets, saved: Saved, part: Part, group: Mapping[str, Any], existing: Mapping[str, Any]
) -> None:
    name = part.pieces[0].name
    for key in _keys(existing, saved.tensors.get(name, {})):
        full = saved.full(name, key)
        target = existing.get(key)
        if full not in targets.index.tensors and not part.tensor.numel():
            continue  # ``needless``, and the layout that wrote the checkpoint left it out
        if not isinstance(target, Tensor) and full in targets.index.tensors:
            stored = targets.index.tensors[full]
            target = empty_state(stored, key, part, group, follows=saved.follows(name, stored))
            if target is None:
                targets.faults.append(f"{full}: is not shaped like its parameter, which is divided over ranks")
                continue
            targets.created.append((part.tensor, key, target))
        targets.add(full, _placed(part, target), converts=True)
    targets.created += [(part.tensor, key, value) for key, value in saved.values.get(name, {}).items()]


def _placed(part: Part, value: Tensor | None) -> Held | None:
    """State of a part that is one parameter: divided as that is where it has a value an element."""
    like = value is not None and value.shape == part.tensor.shape
    return held.in_box(value, part.pieces[0].box) if value is not None and like else value


def _find_divided(
    targets: Targets, saved: Saved, part: Part, group: Mapping[str, Any], existing: Mapping[str, Any]
) -> None:
    """All parameters of a buffer have state of one kind (``keep_apart``): the first one's tells which."""
    name = part.pieces[0].name
    for key in _keys(existing, saved.tensors.get(name, {})):
        if key in saved.singles:
            _find_single(targets, saved, part, key, group)
        else:
            _find_elements(targets, saved, part, key, existing.get(key))
    targets.created += [(part.tensor, key, value) for key, value in saved.values.get(name, {}).items()]


def _find_single(targets: Targets, saved: Saved, part: Part, key: str, group: Mapping[str, Any]) -> None:
    names = {saved.full(piece.name, key) for piece in part.pieces}
    missing = names - saved.numbers.keys()
    targets.faults += [f"{full}: not in the checkpoint as a single number" for full in sorted(missing)]
    targets.placed |= names - missing
    if not missing:
        number, *others = (saved.numbers[full] for full in names)
        assert all(torch.equal(number, other) for other in others), "keep_apart divided what has other numbers"
        targets.created.append((part.tensor, key, number.to(_device(key, part.tensor, group), copy=True)))


def _find_elements(targets: Targets, saved: Saved, part: Part, key: str, target: Any) -> None:
    name = part.pieces[0].name
    stored = targets.index.tensors.get(saved.full(name, key))
    if not isinstance(target, Tensor) and stored is not None:
        dtype = _dtype(stored, part.tensor, saved.follows(name, stored))
        target = torch.zeros_like(part.tensor, dtype=dtype, requires_grad=False)  # padding stays 0
        targets.created.append((part.tensor, key, target))
    pieces: dict[str, Held] = {}
    if isinstance(target, Tensor):
        held.spread(pieces, part, target)
    for piece in part.pieces:
        targets.add(saved.full(piece.name, key), pieces.get(piece.name), converts=True)


def empty_state(
    stored: Stored, key: str, part: Part, group: Mapping[str, Any], *, follows: bool = False
) -> Tensor | None:
    """Room for optimizer state of a whole parameter: laid out like it, or on the device where the optimizer wants it.

    ``follows``: in the parameter's dtype, as it was when it was saved; else in the dtype that was saved. None for state
    that is not shaped like its parameter, when that is divided: nothing says how to divide it.
    """
    parameter = part.tensor
    if key != "step" and stored.shape == part.pieces[0].whole_shape:
        return torch.empty_like(parameter, dtype=_dtype(stored, parameter, follows), requires_grad=False)
    if stored.shape and (hasattr(parameter, "placements") or not held.undivided(part)):
        return None
    return torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device=_device(key, parameter, group))


def _dtype(stored: Stored, parameter: Tensor, follows: bool) -> torch.dtype:
    dtype = DTYPES[stored.dtype]
    return parameter.dtype if follows and {dtype, parameter.dtype} <= FLOATING else dtype


def _device(key: str, parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Optimizers keep ``step`` on the CPU unless they are fused or capturable, as in ``Optimizer.load_state_dict``."""
    host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.device("cpu") if host else parameter.device
