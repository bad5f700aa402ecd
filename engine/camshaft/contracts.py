"""Debug contracts: around each hook of the step, does its plugin write what it did not claim; are copies equal?

On with ``debug.contracts``. Hooks are wrapped where ``bind`` makes callables of them, so a run without it pays nothing.
Who may write what follows from the hooks: gradients belong to who claims their reduction until ``post_reduce``, where
everybody may change them; ``clip``, ``step`` and ``release`` are their owners'; weights change in the step, and in
``around_step`` by who lays them out; buffers and values of the optimizer by nobody else, but for values that a plugin
keeps beside them under a key of its own (``<plugin>.<what>``), as checkpoints then have them. Told by checksums of
every bit; of what may be on its way from other ranks meanwhile (gradients before ``reduce_parts``, parameters that a
plugin divides) by the tensors' version counters, which a write through ``.data`` does not touch.

Copies of a parameter on several ranks, where claims say that they are equal, are compared once a step, one parameter a
rank in turn, and copies of a tied one on other stages each time. What is written outside of hooks (in hooks that a
plugin puts on modules and tensors) is not looked at.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from camshaft.errors import PluginError

if TYPE_CHECKING:
    from camshaft.claims import Plan
    from camshaft.parts import Part, Piece
    from camshaft.state import State

GRADIENT, WEIGHT, VALUE, BUFFER = "the gradient of", "the weight", "the optimizer's value", "the buffer"
Item = tuple[str, str]
"""(kind, name) of a tensor."""
Mark = tuple[int | None, int | None]
"""(what changes when a tensor is written, a checksum that other ranks may change too); None where there is none."""
Look = dict[Item, Mark]

REDUCES, LAYS_OUT = ("gradient.reduce", "gradient.layout"), ("parameter.layout", "optimizer.layout", "gradient.layout")
ANYBODY = ("",)
"""Whoever implements the hook may."""
RULES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "pre_forward": {WEIGHT: ("parameter.layout",)},
    "around_forward": {WEIGHT: ("parameter.layout", "optimizer.layout")},
    "post_backward": {GRADIENT: REDUCES, WEIGHT: ("parameter.layout",)},
    "reduce": {GRADIENT: REDUCES, WEIGHT: ("parameter.layout",), VALUE: ("optimizer.layout",)},
    "reduce_parts": {GRADIENT: ("gradient.reduce",)},
    "post_reduce": {GRADIENT: ANYBODY},
    "clip": {GRADIENT: ANYBODY},
    "lr": {},
    "around_step": {GRADIENT: LAYS_OUT, WEIGHT: LAYS_OUT, VALUE: LAYS_OUT},
    "step": {GRADIENT: ANYBODY, WEIGHT: ANYBODY, VALUE: ANYBODY, BUFFER: ANYBODY},
    "release": {GRADIENT: ANYBODY},
    "post_step": {WEIGHT: ("parameter.layout", "optimizer.layout")},
    "log": {},
    "save": {},
}
"""Hook to what may be written in it, and the resources one of which a plugin must have claimed for it."""
SUMMED = frozenset({"reduce_parts", "post_reduce"})
"""Hooks after which gradients are sums, padding too."""
TRAVELLING = frozenset({"pre_forward", "around_forward", "post_backward", "reduce"})
"""Hooks during which sums of gradients may be on their way."""


class ContractBroken(PluginError):
    """A plugin wrote what it did not claim, or copies that are claimed to be equal are not."""


class Contracts:
    """Looks at everything that a run trains; ``plans`` tell who claimed what."""

    def __init__(self, state: State, plans: Mapping[str, Plan]) -> None:
        self._state, self._plans = state, plans
        claims = [(name, claim) for name, plan in plans.items() for claim in plan.claims]
        self._reduced = any(claim.resource in REDUCES for _, claim in claims)
        self._divided = any(claim.resource in LAYS_OUT[:2] and claim.axis.startswith("dp") for _, claim in claims)
        self._tables: frozenset[str] | None = None

    def call(self, plugin: str, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with a look before and after it."""
        if hook not in RULES:
            return function
        kinds = self._forbidden(plugin, hook)

        def watched(*arguments: Any) -> Any:
            before = self._look(hook, kinds)
            result = function(*arguments)
            self._compare(plugin, hook, before, self._look(hook, kinds))
            if hook in SUMMED:
                self._check_padding(plugin, hook)
            return result

        return watched

    def _check_padding(self, plugin: str, hook: str) -> None:
        """What fills a part up, between and behind its pieces, is 0 in a gradient: norms are taken of all of it."""
        for part in self._state.world.parts:
            gradient = part.tensor.grad
            if gradient is None or hasattr(gradient, "to_local") or gradient.shape != part.tensor.shape:
                continue
            if sum(piece.length for piece in part.pieces) == gradient.numel():
                continue
            rest = gradient.detach().reshape(-1).clone()
            for piece in part.pieces:
                rest[piece.place : piece.place + piece.length] = 0
            if bool(rest.any()):
                near = part.pieces[0].name if part.pieces else "nothing"
                raise ContractBroken(
                    plugin,
                    hook,
                    f"left other numbers than 0 in the padding of the gradient of '{near}' and what lies with it, in "
                    f"step {self._state.step + 1}: the norm counts them",
                )

    def wrap(self, plugin: str, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same of a middleware: what it wraps may write anything, and it may not, before and after it."""
        kinds = self._forbidden(plugin, hook)

        def watched(state: State, inner: Callable[..., Any]) -> Callable[..., Any]:
            looks: list[Look] = []

            def called(*arguments: Any) -> Any:
                self._compare(plugin, hook, looks.pop(), self._look(hook, kinds))
                result = inner(*arguments)
                looks.append(self._look(hook, kinds))
                return result

            outer = function(state, called)
            if not callable(outer) or outer is called:  # the caller refuses the first; the second does nothing
                return inner if callable(outer) else outer

            def around(*arguments: Any) -> Any:
                looks.append(self._look(hook, kinds))
                result = outer(*arguments)
                self._compare(plugin, hook, looks.pop(), self._look(hook, kinds))
                return result

            return around

        return watched

    def _forbidden(self, plugin: str, hook: str) -> frozenset[str]:
        """Kinds of tensors that ``plugin`` may not write in ``hook``."""
        own = {claim.resource for claim in self._plans[plugin].claims} if plugin in self._plans else set()
        allowed = {kind for kind, need in RULES[hook].items() if need is ANYBODY or own & set(need)}
        return frozenset({GRADIENT, WEIGHT, VALUE, BUFFER}) - allowed

    def _look(self, hook: str, kinds: frozenset[str]) -> Look:
        """A number for each tensor of ``kinds`` that changes when it is written; None where there is no tensor."""
        state, found = self._state, Look()
        if GRADIENT in kinds:
            if hook in TRAVELLING and self._reduced:
                found |= {(GRADIENT, name): _marked(p.grad) for name, p in state.model.named_parameters()}
            else:
                for part in state.world.parts:
                    found |= _by_piece(GRADIENT, part, part.tensor.grad)
        if WEIGHT in kinds:
            for part in state.world.parts:
                found |= _by_piece(WEIGHT, part, part.tensor)
            mark = _marked if self._divided else _summed
            found |= {(WEIGHT, f"{name} (of the model)"): mark(p) for name, p in state.model.named_parameters()}
        if VALUE in kinds:
            for part in state.world.parts:
                for key, value in state.optimizer.state.get(part.tensor, {}).items():
                    if isinstance(value, Tensor):
                        found |= _by_piece(VALUE, part, value, f"/{key}")
        if BUFFER in kinds:
            found |= {(BUFFER, name): _summed(buffer) for name, buffer in state.model.named_buffers()}
        return found

    def _compare(self, plugin: str, hook: str, before: Look, after: Look) -> None:
        nothing: Mark = (None, None)
        every = [*before, *(item for item in after if item not in before)]
        differ = [item for item in every if before.get(item, nothing)[0] != after.get(item, nothing)[0]]
        changed = [item for item in differ if not _is_own(plugin, item)]
        if not changed:
            return
        surely = [item for item in changed if before.get(item, nothing)[1] != after.get(item, nothing)[1]]
        kind, name = (surely or changed)[0]
        step = self._state.step + (hook not in ("post_step", "log", "save"))
        need = RULES[hook].get(kind, ())
        why = f"without a claim on {' or '.join(need)}" if need else "which nobody may do there"
        raise ContractBroken(plugin, hook, f"wrote {kind} '{name}' in step {step}, {why}")

    def compare_copies(self) -> None:
        """Compare this step's sample of copies over all ranks. Collective, after the last backward of a window.

        Raises:
            ContractBroken: two ranks hold other bits; on every rank.
        """
        state = self._state
        if state.world.world_size == 1:
            return
        if self._tables is None:
            self._tables = _tables(state)
        everyone = _gather(state, self._sample())
        first: dict[Any, tuple[int, int]] = {}
        for rank, sample in enumerate(everyone):
            for key, value in sample.items():
                other, wanted = first.setdefault(key, (rank, value))
                if wanted != value:
                    raise ContractBroken(
                        self._keeper(other, rank),
                        "reduce",
                        f"ranks {other} and {rank} hold other values of '{key[0]}' in step {state.step + 1}, of which "
                        "claims say that they are copies",
                    )

    def _sample(self) -> dict[Any, int]:
        """(parameter, which elements) to checksum: the parameter whose turn it is, and tied tables."""
        state, world = self._state, self._state.world
        found: dict[Any, int] = {}
        # Names of the model, which ranks have alike that hold copies, and not those of a rank's own parts.
        names = sorted(name for name, _ in state.model.named_parameters())
        chosen = names[state.step % len(names)] if names else ""
        for part in world.parts:
            for piece, flat in part.slices(part.tensor.detach()):
                if piece.name == chosen:
                    found[chosen, _place(piece)] = checksum(flat) or 0
        if not world.readable:
            return found
        world.settle()
        place = world.mesh.place["tp"]
        for name, parameter in state.model.named_parameters():
            if name == chosen and not world.stages:
                box = world.boxes.get(name)
                found[name, "of the model", None if box is None else box.offset] = checksum(parameter) or 0
            if name in (self._tables or ()):
                found[f"{name} (tied)", place, tuple(parameter.shape)] = checksum(parameter) or 0
        for tensor in _borrowed(state.model).values():
            for name in self._tables or ():
                found[f"{name} (tied)", place, tuple(tensor.shape)] = checksum(tensor) or 0
        return found

    def _keeper(self, one: int, other: int) -> str:
        """The plugin that keeps copies on two ranks equal: who reduces gradients along an axis that they differ on."""
        shape = self._state.world.mesh.shape
        left, right = shape.coordinates(one), shape.coordinates(other)
        differ = {axis for axis in left if left[axis] != right[axis]}
        owners = [
            name
            for resource in ("gradient.reduce", "parameter.layout")
            for name, plan in self._plans.items()
            if any(claim.resource == resource and claim.axis in differ for claim in plan.claims)
        ]
        return owners[0] if owners else "?"


def _by_piece(kind: str, part: Part, values: Tensor | None, key: str = "") -> Look:
    """A checksum for each piece of a part: of ``values``, laid out as its tensor; of all of them where they are not."""
    if values is None or values.shape != part.tensor.shape or hasattr(values, "to_local"):
        return {(kind, f"{piece.name}{key}"): _summed(values) for piece in part.pieces[:1]}
    return {(kind, f"{piece.name}{key}"): _summed(flat) for piece, flat in part.slices(values.detach())}


def _is_own(plugin: str, item: Item) -> bool:
    """Whether it is a value that ``plugin`` keeps beside the optimizer's, under a key that begins with its name."""
    return item[0] == VALUE and item[1].rpartition("/")[2].startswith(f"{plugin}.")


def _place(piece: Piece) -> tuple[Any, ...]:
    return (None if piece.box is None else piece.box.offset, piece.start, piece.length)


def _summed(tensor: Tensor | None) -> Mark:
    found = checksum(tensor)
    return found, found


def _marked(tensor: Tensor | None) -> Mark:
    """By the version counter, which is one for all views of a buffer: the checksum tells which of them it was."""
    return (None, None) if tensor is None else (tensor._version, checksum(tensor))


def checksum(tensor: Tensor | None) -> int | None:
    """Of every bit of this rank's elements; None of nothing."""
    if tensor is None:
        return None
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    local = local.detach()
    if local.untyped_storage().nbytes() < local.nbytes:  # freed until it is gathered again
        return 0
    flat = local.contiguous().reshape(-1).view(torch.uint8)
    if flat.is_cpu:
        return zlib.crc32(flat.numpy().data)
    return weighted(flat)


def weighted(flat: Tensor) -> int:
    """Sum of bytes, each times a number above 0 that its place tells: for devices that have no checksum."""
    return int((flat.long() * (torch.arange(flat.numel(), device=flat.device) % 65521 + 1)).sum())


def _borrowed(model: nn.Module) -> dict[str, Tensor]:
    """Weights that are copies of another stage's parameter: plain tensors in the place of one."""
    found = {f"{name}.weight": vars(module).get("weight") for name, module in model.named_modules()}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _tables(state: State) -> frozenset[str]:
    """Parameters that other stages have copies of: embeddings, where any rank borrows a weight. Collective."""
    if not any(_gather(state, sorted(_borrowed(state.model)))):
        return frozenset()
    everyone = _gather(state, sorted(name for name, role in state.world.roles.items() if role == "embedding"))
    return frozenset(name for names in everyone for name in names)


def _gather(state: State, own: Any) -> list[Any]:
    everyone: list[Any] = [None] * state.world.world_size
    torch.distributed.all_gather_object(everyone, own)
    return everyone
