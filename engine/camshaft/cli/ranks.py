"""The part of ``camshaft plan`` that says what a rank holds and whom it talks to: any one, or the fullest.

Ranks that differ only along axes that split the batch hold and send the same, so one of them stands for all: 4,096
ranks are counted in a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from camshaft.cli import estimate
from camshaft.cli.console import columns
from camshaft.holding import places
from camshaft.peak import Peak, peak

if TYPE_CHECKING:
    from camshaft.activations import Kept
    from camshaft.estimate import Estimate, Sizes
    from camshaft.host import Host
    from camshaft.mesh import MeshShape
    from camshaft.models.shapes import ParameterShape
    from camshaft.recipe import Checked


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank holds and sends."""

    rank: int
    sizes: Sizes
    estimate: Estimate
    kept: tuple[Kept, ...] = ()
    peak: Peak | None = None
    """None where what a forward keeps is not known."""

    @property
    def state(self) -> int:
        """Bytes of model state."""
        assert self.estimate.state is not None
        return self.estimate.state.total

    @property
    def memory(self) -> int:
        """Bytes of model state and of all buffers."""
        return self.state + sum(size for _, size in self.estimate.buffers)

    @property
    def most(self) -> int:
        """Bytes at the fullest moment, as far as they are known."""
        return self.memory if self.peak is None else self.peak.bytes

    @property
    def sent(self) -> int:
        """Bytes sent in a step."""
        return sum(entry.bytes for entry in self.estimate.sent)


class Ranks:
    """Every rank of a checked recipe, counted when it is asked for."""

    def __init__(self, checked: Checked, host: Host) -> None:
        assert checked.mesh is not None
        self.mesh, self._checked, self._host = checked.mesh, checked, host
        self.own_model = bool(host.implementations("build_model"))

    def holding(self, rank: int) -> Holding:
        """What ``rank`` holds and sends."""
        counted = estimate.sizes(self._checked, self._host, rank)
        found = estimate.estimate(self._checked, self._host, rank, counted)
        if counted.config is None:
            return Holding(rank, counted, found)
        kept = estimate.activations(self._checked, self._host, counted)
        return Holding(rank, counted, found, kept, peak(kept, counted, found))

    @cached_property
    def representatives(self) -> list[Holding]:
        """One rank of each place on the axes that do not split the batch: the first, in order."""
        return [self.holding(rank) for rank in places(self.mesh)]

    @property
    def alike(self) -> bool:
        """Whether every rank holds and sends the same, as far as the axes tell."""
        return len(places(self.mesh)) == 1

    @property
    def fullest(self) -> Holding:
        """The first of the ranks that hold most."""
        return max(self.representatives, key=lambda each: (each.most, -each.rank))


def show(ranks: Ranks, rank: int | None) -> str:
    """Place, peers, holdings, bytes and traffic of ``rank``, or of the fullest, and all stages of a pipeline."""
    shown = ranks.fullest if rank is None else ranks.holding(rank)
    alike = ranks.alike and rank is None
    parts = [] if alike else [_place(ranks.mesh, shown, "" if rank is not None else ", which holds most")]
    if rank is None and ranks.mesh["pp"].degree > 1:
        parts.insert(0, _stages(ranks))
    return "\n\n".join(
        [*parts, estimate.show(shown.estimate, shown.kept, shown.peak, None if alike else shown.rank, ranks.own_model)]
    )


def _place(mesh: MeshShape, shown: Holding, why: str) -> str:
    digits = mesh.coordinates(shown.rank)
    place = "  ".join(f"{name}={digits[name]}" for name in mesh.names)
    lines = [f"rank {shown.rank} of {mesh.world_size}{why}", f"place        {place}"]
    if shown.sizes.whole is not None:
        lines.append(f"holds        {_held(shown.sizes, shown.sizes.whole)}")
    peers = [
        (f"along {name}", ranges(mesh.along(shown.rank, name), limit=8)) for name in mesh.names if mesh[name].degree > 1
    ]
    return "\n".join(lines) + ("\n" + columns(("", "ranks that it exchanges with, and itself"), peers) if peers else "")


def _held(sizes: Sizes, whole: tuple[ParameterShape, ...]) -> str:
    everything = sum(each.elements for each in whole)
    text = (
        f"{sizes.elements:,} of {everything:,} elements: {_layers((*(sizes.parameters or ()), *sizes.borrowed), whole)}"
    )
    shared = [each for each in sizes.parameters or () if each.copies > 1]
    if shared:
        text += f"; {sum(each.elements for each in shared):,} of them in copies that other ranks have too"
    return text


def _layers(own: Iterable[ParameterShape], whole: tuple[ParameterShape, ...]) -> str:
    """``embedding, layers 0..3, norm and head``: what these parameters are of."""
    held, layers = {each.layer for each in own}, max(each.layer for each in whole)
    words = ["embedding"] if -1 in held else []
    inner = sorted(held - {-1, layers})
    words += [f"layer{'s' if len(inner) > 1 else ''} {ranges(inner)}"] if inner else []
    return ", ".join([*words, *(["last norm and head"] if layers in held else [])]) or "nothing"


def _stages(ranks: Ranks) -> str:
    """A line for each place along the pipeline, of the fullest rank there."""
    best: dict[int, Holding] = {}
    for each in ranks.representatives:
        place = ranks.mesh.coordinates(each.rank)["pp"]
        if place not in best or each.most > best[place].most:
            best[place] = each
    return "by place along pp, the fullest rank of each\n" + columns(
        ("pp", "stages", "holds", "elements", "model state", "with buffers", "peak", "sent a step"), [*_rows(best)]
    )


def _rows(best: dict[int, Holding]) -> Iterator[tuple[str, ...]]:
    for place, each in sorted(best.items()):
        known = (*(each.sizes.parameters or ()), *each.sizes.borrowed)
        yield (
            str(place),
            ranges(sorted({parameter.stage for parameter in known})) or "?",
            "?" if each.sizes.whole is None else _layers(known, each.sizes.whole),
            f"{each.sizes.elements:,}",
            *(f"{estimate.short(size / 1e9)} GB" for size in (each.state, each.memory, each.most, each.sent)),
        )


def ranges(numbers: Iterable[int], limit: int | None = None) -> str:
    """``0..3, 8, 12 (6)``: runs, and how many numbers there are; of more than ``limit`` runs the middle is left out."""
    runs: list[list[int]] = []
    count = 0
    for number in numbers:
        count += 1
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    words = ["..".join(map(str, run)) for run in runs]
    if limit is not None and len(words) > limit:
        words = [*words[: limit - 1], "...", words[-1]]
    return ", ".join(words) + (f" ({count})" if limit is not None and count > 1 else "")
