"""The plugin at work on one rank: modules with their forwards, what was counted of them, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import Module

from camshaft.comm import Channel
from camshaft.errors import RecipeError
from camshaft_recompute.choice import Choice, Cost, best
from camshaft_recompute.keeping import Keeper
from camshaft_recompute.kinds import makes, of_kinds, unknown
from camshaft_recompute.offload import Line, Offloaded
from camshaft_recompute.operations import strange
from camshaft_recompute.options import Options
from camshaft_recompute.region import Region
from camshaft_recompute.regions import find
from camshaft_recompute.tally import Seen, Tally

if TYPE_CHECKING:
    from camshaft.state import State, World

GIB = 2**30
OFFLOAD_FROM_KIB = 256.0


class Runtime:
    """What ``recompute`` puts on the modules of ``model``, until ``close``."""

    def __init__(self, name: str, options: Options, world: World, model: Module) -> None:
        self._name, self._options, self._world = name, options, world
        self._tally = Tally()
        self._peers: Channel | None = None
        self._stages: Channel | None = None
        self.inert: str | None = None
        self._regions = self._made(find(model, options, name, whole=not world.stages))
        for each in self._regions.values():
            each.install()

    def _made(self, modules: dict[str, Module]) -> dict[str, Region | Offloaded]:
        options, device, tally = self._options, self._world.device, self._tally
        if options.mode == "offload":
            kib = OFFLOAD_FROM_KIB if options.offload_from_kib is None else options.offload_from_kib
            line, least = Line(device, self._place), int(kib * 1024)
            return {name: Offloaded(name, module, device, tally, least, line) for name, module in modules.items()}
        missing = unknown(options.kinds)
        if missing:
            raise RecipeError(strange(missing[0], f"plugins.{self._name}.save"))
        keep = of_kinds(options.kinds) if options.mode == "selective" and options.budget is None else None
        return {name: Region(name, module, device, tally, keep) for name, module in modules.items()}

    def _place(self) -> tuple[int, int]:
        state = self._tally.state
        return (0, 0) if state is None else (state.stage, state.microbatch)

    @property
    def counting(self) -> bool:
        """Whether the first window is still to be concluded."""
        return self._tally.open

    def bind(self, state: State) -> None:
        """Collective: ranks that run the same modules choose alike, and stages tell each other what they save."""
        self._tally.state = state
        mesh = state.world.mesh
        shape = mesh.shape
        same = shape.joined(*(axis.name for axis in shape.axes if axis.name != "pp"))
        if self._options.budget is not None and same:
            self._peers = mesh.channel(self._name, same)
        if shape.joined("pp"):
            self._stages = mesh.channel(self._name, "pp")

    def begin(self) -> None:
        """A forward starts."""
        self._tally.begin()

    def conclude(self, state: State) -> Iterator[str]:
        """The first window is over: choose, and say what is so from now on. Collective. Yields lines for the log."""
        tally, self._tally.open = self._tally, False
        chosen = self._choose() if self._options.budget is not None else 0
        saved, kept = tally.saved_bytes - chosen, tally.kept_bytes + chosen
        flops = tally.extra_flops - self._spared
        state.extras |= {
            f"plugin/{self._name}/saved_gib": saved / GIB,
            f"plugin/{self._name}/kept_gib": kept / GIB,
            f"plugin/{self._name}/extra_tflops": flops / 1e12,
            f"plugin/{self._name}/extra_share": flops / tally.flops if tally.flops else 0.0,
        }
        self.inert = self._reason(saved)
        if state.world.is_main and self.inert is None:
            yield from self._lines(saved, kept, flops)
        tally.calls.clear()

    _spared = 0.0
    """Floating-point operations of what the budget lets keep."""
    _spared_calls = 0
    """Operations that do not run again because of that."""

    def _lines(self, saved: int, kept: int, flops: float) -> Iterator[str]:
        where, tally = f"in {len(self._regions)} modules", self._tally
        if any(each.compiled for each in self._regions.values()):
            yield f"recompute: {where}; a compiler decides what is kept of them, and nothing of it is counted"
        elif self._options.mode == "offload":
            yield f"recompute: {_bytes(saved)} a microbatch wait in the host's memory {where}; nothing runs again"
        else:
            share = f" ({flops / tally.flops:.0%} of theirs)" if tally.flops else ""
            calls = sum(each.again.calls for each in tally.calls) - self._spared_calls
            yield (
                f"recompute: saves {_bytes(saved)} a microbatch and keeps {_bytes(kept)} {where}; costs "
                f"{flops / 1e9:.4g} GFLOP of products and attention{share} in {calls} operations more"
            )
        base, budget = sum(each.inputs for each in tally.calls), self._options.budget
        if budget is not None and base > budget:
            yield f"recompute: inputs alone are {_bytes(base)}, more than the budget of {_bytes(budget)}"

    def _reason(self, saved: int) -> str | None:
        """Why nothing was saved; where there are stages, on none of them."""
        compiled = any(each.compiled for each in self._regions.values())
        found = torch.tensor([len(self._regions), max(saved, 0) + compiled], dtype=torch.float64)
        if self._stages is not None:
            found = found.to(self._world.device)
            self._stages.all_reduce(found, "post_reduce", "max").wait()
        modules, bytes_saved = found.tolist()
        if not modules:
            return "no module of the model is one of those that it is to work on; see plugins.recompute.modules"
        if bytes_saved or self._options.budget is not None:
            return None
        if self._options.mode == "offload":
            return "no tensor that the modules keep is large enough to leave; lower plugins.recompute.offload_from_kib"
        return "its modules keep no more for backward than their inputs and what is to be kept: nothing is saved"

    def _choose(self) -> int:
        """Let each module keep what fits the budget; returns the bytes of it."""
        budget, device = self._options.budget, self._world.device
        assert budget is not None
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)  # operations are timed by events that must be over
        calls: dict[str, list[Seen]] = {}
        for call in self._tally.calls:
            calls.setdefault(call.name, []).append(call)
        costs = self._agreed([[*_costs(each), _whole(each)] for each in calls.values()])
        results, wholes = [each[:-1] for each in costs], [each[-1] for each in costs]
        left = budget - sum(each.inputs for each in self._tally.calls)
        return sum(
            self._settle(several, choice, own)
            for several, choice, own in zip(calls.values(), best(results, wholes, left), costs, strict=True)
        )

    def _settle(self, calls: Sequence[Seen], choice: Choice, costs: Sequence[Cost]) -> int:
        """Let the module of ``calls`` do as chosen; returns the bytes that it keeps of them."""
        region = self._regions[calls[0].name]
        assert isinstance(region, Region)
        if choice is None:
            region.plain = True
            self._spared += sum(call.again.flops for call in calls)
            self._spared_calls += sum(call.again.calls for call in calls)
            return sum(call.dropped for call in calls)
        region.keeper = Keeper(makes, choice) if choice else None
        self._spared += sum(call.first.done[number].flops for call in calls for number in choice)
        self._spared_calls += len(calls) * len(choice)
        return sum(costs[number].bytes for number in choice)

    def _agreed(self, own: list[list[Cost]]) -> list[list[Cost]]:
        """The largest of each that any rank with the same modules has; none where ranks ran other operations."""
        if self._peers is None:
            return own
        device = self._world.device
        count = float(sum(len(each) for each in own))
        both = torch.tensor([count, -count], dtype=torch.float64, device=device)
        self._peers.all_reduce(both, "post_reduce", "max").wait()
        if float(both[0]) != -float(both[1]):
            return [[Cost(2**62, 0.0)] for _ in own]
        numbers = [number for each in own for cost in each for number in cost]
        flat = torch.tensor(numbers, dtype=torch.float64, device=device)
        self._peers.all_reduce(flat, "post_reduce", "max").wait()
        agreed = iter(flat.tolist())
        return [[Cost(int(next(agreed)), next(agreed)) for _ in each] for each in own]

    def close(self) -> None:
        """Give every module its forward back."""
        for each in self._regions.values():
            each.close()
        self._regions = {}


def _whole(calls: Sequence[Seen]) -> Cost:
    """Of a module that is left as it is."""
    seconds = sum(_seconds(call, place) for call in calls for place in range(len(call.first.done)))
    return Cost(sum(call.dropped for call in calls), seconds)


def _costs(calls: Sequence[Seen]) -> list[Cost]:
    """Of each result that could be kept, over all calls of a module; none where those ran other operations."""
    tables = [_costs_of(call) for call in calls]
    if len({len(each) for each in tables}) != 1:
        return []
    return [
        Cost(sum(each.bytes for each in same), sum(each.seconds for each in same)) for same in zip(*tables, strict=True)
    ]


def _costs_of(call: Seen) -> list[Cost]:
    """What cannot be kept saves nothing."""
    return [
        Cost(each.bytes, 0.0 if each.spoiled else _seconds(call, place)) for place, each in enumerate(call.first.done)
    ]


def _seconds(call: Seen, place: int) -> float:
    """Of an operation in the faster of both runs; 0 of one that a second run does not come to."""
    first, again = call.first.done[place], call.again.done[place : place + 1]
    if first.saved >= call.first.saved:
        return 0.0
    return min(each.seconds() for each in (first, *again))


def _bytes(size: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.0f} B"
