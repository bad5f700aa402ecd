"""The most memory that a rank needs at once, from its model state and from what forwards keep. Pure, without torch.

While a backward runs, what its forward kept goes, and gradients come. So the peak is one of several moments: the
forward of what takes much memory to be made, with all that was kept before it; the backward of the loss, where all is
kept and the logits have gradients; that of a layer, where gradients of what is above are there and activations of what
is below; the step, where all gradients are there and nothing is kept any more.

Working memory counted: gradients of the logits, of one half of a layer and of the hidden states. Not counted:
workspaces of libraries, fragments of allocators, and what an optimizer that is not fused makes for a moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from camshaft.estimate import CLOSING, PASSING

if TYPE_CHECKING:
    from camshaft.activations import Kept
    from camshaft.estimate import Estimate, Sizes, StateBytes

Place = tuple[int, int]
"""(layer, half): attention and the norm before it are half 0, the MLP and its norm half 1. The embedding is of layer
-1; last norm and projection are half 0 of the layer behind the last one, the loss its half 1."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The fullest moment of a step."""

    moment: str
    bytes: int
    """All of it."""
    working: int
    """Part of it that is neither model state nor a buffer nor kept by a forward."""


def peak(kept: tuple[Kept, ...], sizes: Sizes, found: Estimate) -> Peak:
    """The fullest moment of a rank that keeps ``kept`` in each forward; ``found``: its model state and buffers."""
    assert found.state is not None
    most = _peak(kept, sizes, found, found.state)
    if any(each.once for each in kept):
        early = tuple(replace(each, bytes=each.bytes + each.once, once=0) for each in kept)
        first = _peak(early, sizes, found, replace(found.state, moments=0))
        if first.bytes > most.bytes:
            return replace(first, moment=f"{first.moment}, in the first window")
    return most


def _peak(kept: tuple[Kept, ...], sizes: Sizes, found: Estimate, state: StateBytes) -> Peak:
    closing, passing = (sum(size for what, size in found.buffers if what.endswith(each)) for each in (CLOSING, PASSING))
    always = state.total - state.gradients + sum(size for _, size in found.buffers) - closing - passing
    moments = [Peak("the step", always + state.gradients + closing, 0)]
    backward = _Backward(kept, sizes, state.gradients, passing)
    moments += [Peak(moment, always + size, working) for moment, size, working in (*backward.forwards(), *backward)]
    return max(moments, key=lambda each: each.bytes)


class _Backward:
    """Moments of the backward in which most is held: (what runs, bytes beside what is always there, working memory)."""

    def __init__(self, kept: tuple[Kept, ...], sizes: Sizes, gradients: int, passing: int) -> None:
        self._kept, self._sizes, self._passing = kept, sizes, passing
        self._last = max((each.layer for each in sizes.whole or ()), default=0)
        total = sizes.trained * sizes.widths.gradient
        self._share = gradients / total if total else 0.0
        """Part of its gradients that the rank keeps."""
        held = max((each.microbatches for each in kept), default=1)
        self._before = gradients if sizes.accumulation > held else 0
        """Gradients of earlier microbatches."""
        self._added: Counter[Place] = Counter()
        for each in (*(sizes.parameters or ()), *sizes.borrowed):
            if each.trains:
                self._added[self._place(each.name)] += each.elements * sizes.widths.param

    def _place(self, name: str) -> Place:
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            return int(parts[2]), int(parts[3] in ("mlp", "post_attention_layernorm"))
        if parts[0] == "loss":
            return self._last, 1
        return (self._last, 0) if parts[0] == "lm_head" or parts[:2] == ["model", "norm"] else (-1, 0)

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        places: dict[Place, list[Kept]] = {}
        for each in self._kept:
            places.setdefault(self._place(each.module), []).append(each)
        below, above, come = sum(each.held for each in self._kept), 0.0, 0
        tied = self._tied()
        for place in sorted({*places, *self._added}, reverse=True):
            here, new = places.get(place, []), self._added[place]
            come += new
            passing = min(self._passing, come)
            working = self._working(place, here)
            pending = tied if place < (self._last, 1) else 0
            early = self._before + above + passing + pending + working + below + self._again(places, place)
            once = sum(each.bytes for each in here)
            late = early - working - once - sum(each.again for each in here) + new + self._hidden(3)
            yield self._word(place), round(max(early, late)), round(working)
            below -= once  # of other microbatches it stays
            above += 0 if self._before else new * self._share

    def forwards(self) -> Iterator[tuple[str, int, int]]:
        """Moments of the forward in which something is there that backward never sees."""
        held = self._before
        for each in self._kept:
            held += each.held
            if each.making:
                word = self._word(self._place(each.module)).replace("backward", "forward", 1)
                yield word, held + each.making, each.making

    def _again(self, places: Mapping[Place, list[Kept]], now: Place) -> int:
        """What came back for the backward of a layer and has not been used yet."""
        return sum(each.again for place in places if place[0] == now[0] and place <= now for each in places[place])

    def _tied(self) -> int:
        """A tied table's gradient of the projection waits for that of the embedding."""
        tied = sum(each.elements for each in self._sizes.parameters or () if each.tied and each.trains)
        return tied * self._sizes.widths.param

    def _hidden(self, times: int) -> int:
        return times * self._sizes.hidden * self._sizes.widths.param

    def _word(self, place: Place) -> str:
        layer, half = place
        if layer == self._last:
            return "the backward of the loss" if half else "the backward of the output projection"
        return "the backward of the embedding" if layer < 0 else f"the backward of layer {layer}"

    def _working(self, place: Place, here: list[Kept]) -> int:
        """Gradients of what the place keeps, as far as they are there at once."""
        layer, half = place
        made = Counter[str]()
        for each in here:
            made[each.name] += each.bytes + each.again
        if (layer, half) == (self._last, 1):
            return 2 * (made["log_softmax"] or made["softmax"]) + made["logits"]
        if layer == self._last:
            return self._added[place] + self._hidden(1)
        if layer < 0:
            return self._added[place] + self._hidden(1)
        if half:
            return 2 * made["activated"] + self._added[place] // 3 + self._hidden(1)
        return 2 * made["out"] + made["q"] + self._added[place] // 4 + self._hidden(1)
