"""Which provider each operation gets, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from camshaft.errors import MachineError, PluginError, Problem, RecipeError
from camshaft.ops import Kernel
from camshaft_kernels import table
from camshaft_kernels.checks import MADE_BY_FUSED
from camshaft_kernels.registry import AUTO, TORCH, UNFUSED, own_form
from camshaft_kernels.sizes import device_of, dtype_of, elements

if TYPE_CHECKING:
    from camshaft.models.config import ModelConfig
    from camshaft.state import World
    from camshaft_kernels.table import Table

Offered = Mapping[str, Mapping[str, Kernel]]
"""Operation to provider to kernel."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What one operation got. ``others``: provider to why it was not taken."""

    op: str
    asked: str
    provider: str
    why: str
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether anything is replaced by it."""
        return self.provider != own_form(self.op)


def offered(kernels: Sequence[Kernel]) -> Offered:
    """All offers by operation and provider.

    Raises:
        PluginError: two plugins offer one provider of an operation.
    """
    found: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        providers = found.setdefault(kernel.op, {})
        if kernel.provider in providers:
            raise PluginError("?", "kernels", f"'{kernel.provider}' of {kernel.op} is offered twice")
        providers[kernel.provider] = kernel
    return found


def choose(
    wishes: Mapping[str, str], bars: Mapping[str, str], kernels: Offered, world: World, config: ModelConfig, key: str
) -> list[Choice]:
    """A choice for each of ``wishes`` (operation to provider, or ``auto``), the same on all ranks.

    ``bars``: operation to why no provider of it may be taken by ``auto``. ``key``: of the plugin in the recipe.

    Raises:
        RecipeError: something named cannot be used here; tells everything of the kind.
        MachineError: what rank 0 chose cannot be used on this rank.
    """
    problems: list[Problem] = []
    measured = table.load(device_of(world.device)) if AUTO in wishes.values() else None
    found = []
    for op, wish in wishes.items():
        offers = kernels.get(op, {})
        if wish != AUTO:
            problems += _named(op, wish, offers, world, key)
            found.append(Choice(op, wish, wish, "named in the recipe"))
            continue
        reasons = {name: kernel.missing(world) for name, kernel in offers.items()}
        if op in bars or (op == "cross_entropy" and any(_makes_loss(each) for each in found)):
            found.append(Choice(op, wish, own_form(op), bars.get(op, MADE_BY_FUSED)))
        else:
            found.append(_best(op, reasons, measured, world, config))
    if problems:
        raise RecipeError(problems)
    return _agree(found, kernels, world)


def _makes_loss(choice: Choice) -> bool:
    return choice.op == "linear_cross_entropy" and choice.changes


def _named(op: str, wish: str, offers: Mapping[str, Kernel], world: World, key: str) -> list[Problem]:
    """What is wrong with a wish. Others than the one that it names are not asked: they have no part in it."""
    if wish not in offers:
        message, fix = f"nobody offers '{wish}' of {op}", f"take one of {', '.join(offers)}"
    elif (reason := offers[wish].missing(world)) is not None:
        message, fix = f"'{wish}' cannot be used: {reason}", f"set it to {AUTO}, or remove the line"
    else:
        return []
    return [Problem(message, key=f"{key}.{op}", fix=fix)]


def _best(
    op: str, reasons: Mapping[str, str | None], measured: Table | None, world: World, config: ModelConfig
) -> Choice:
    """The fastest by the table, else the first by the rules, else torch's own form."""
    others = {name: reason for name, reason in reasons.items() if reason is not None}
    present = [name for name, reason in reasons.items() if reason is None]
    row = None if measured is None else measured.nearest(op, dtype_of(op, world), elements(op, world, config))
    times = {} if row is None else {name: row.ms[name] for name in present if name in row.ms}
    if row is not None and times:
        taken = min(times, key=lambda name: times[name])
        others |= {name: f"{ms:.3g} ms" for name, ms in times.items() if name != taken}
        why = f"{times[taken]:.3g} ms at {row.shape} {row.dtype}, the fastest measured here"
    else:
        rule = table.rules().get(world.device.type, {}).get(op)
        taken = next((name for name in (rule.order if rule else ()) if name in present), own_form(op))
        why = f"not measured; {rule.why}" if rule and taken != own_form(op) else "not measured; torch's own form"
    told = {taken, *others}
    others |= dict.fromkeys([name for name in present if name not in told], "not measured: camshaft bench kernels")
    return Choice(op, AUTO, taken, why, {name: why for name, why in others.items() if name != taken})


def _agree(found: list[Choice], kernels: Offered, world: World) -> list[Choice]:
    """Rank 0 decides what ``auto`` is: other tables and packages elsewhere would make copies of a weight differ."""
    if world.world_size == 1 or all(choice.asked != AUTO for choice in found):
        return found
    said: list[dict[str, str]] = [{choice.op: choice.provider for choice in found}]
    dist.broadcast_object_list(said, src=0, device=world.device if world.device.type == "cuda" else None)
    return [_follow(choice, said[0][choice.op], kernels, world) for choice in found]


def _follow(choice: Choice, provider: str, kernels: Offered, world: World) -> Choice:
    if provider == choice.provider:
        return choice
    kernel = kernels.get(choice.op, {}).get(provider)
    reason = "nobody offers it" if kernel is None else kernel.missing(world)
    if reason is not None and provider not in (TORCH, UNFUSED):
        raise MachineError(
            f"rank 0 chose '{provider}' for {choice.op}, which cannot be used on rank {world.rank}: {reason}. Name a "
            "provider that all ranks have, or install it there"
        )
    return replace(choice, provider=provider, why="rank 0 chose it")
