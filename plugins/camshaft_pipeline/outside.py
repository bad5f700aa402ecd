"""Random numbers that a stage draws in front of its layers, where no seed tells which ones one process would draw.

The core seeds each microbatch and each layer, so what a layer draws does not depend on who ran the one before. What the
model draws between its layers does: one process goes on from the layer before, which is on another rank. In the first
window each stage but the first looks whether that is so; after it nothing is left of this.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from camshaft.errors import Problem, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from camshaft.models.stages import Span
    from camshaft.state import World


class Outside:
    """Watches the stages of this rank until ``close``."""

    def __init__(self, world: World, model: Any, key: str) -> None:
        layers: str = model.pipeline.layers
        spans: Mapping[int, Span] = model.spans
        self._device, self._key = world.device, key
        self._before: list[torch.Tensor] | None = None
        self._handles: list[RemovableHandle] = []
        if not world.draws:
            return  # the core looks whether that is true
        if any(f"{layers}.".startswith(f"{piece}.") for piece in world.pieces):
            return  # one compiled piece: nothing can look into it
        for stage, span in spans.items():
            if not span.first:
                layer = model.get_submodule(f"{layers}.{span.begin}")
                # In front of the core's hook, which seeds.
                self._handles.append(layer.register_forward_pre_hook(partial(self._look, stage, span), prepend=True))

    def begin(self) -> None:
        """The model's forward begins."""
        if self._handles:
            self._before = self._states()

    def _look(self, stage: int, span: Span, layer: torch.nn.Module, _: Any) -> None:
        """In the forward, not where the layer runs again.

        Raises:
            RecipeError: something was drawn.
        """
        before, self._before = self._before, None
        if before is None or not layer.training:
            return
        if not all(torch.equal(was, now) for was, now in zip(before, self._states(), strict=True)):
            raise RecipeError(
                Problem(
                    f"the model draws random numbers in front of layer {span.begin}, outside of it: stage {stage} "
                    "begins there, and they would not be those of one process, where it goes on from layer "
                    f"{span.begin - 1}",
                    key=self._key,
                    fix="draw them inside of the layer's own forward",
                )
            )

    def _states(self) -> list[torch.Tensor]:
        """Of the generators that a forward may draw from; reading them waits for nothing."""
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._before = [], None
