"""Random numbers as a function of where they are drawn: (seed, step, part of the batch, microbatch, layer).

torch's generators are seeded before each window, where each microbatch begins, and again in front of each layer of a
model that names its layers (``camshaft.models.stages``). So dropout does not depend on the order in which microbatches
run, nor on which process runs the layers before; a resumed run draws what an undisturbed one would have drawn, and no
checkpoint holds a random state. It costs the host some microseconds a layer, more where its caches are cold, and a
device nothing. Where neither the model nor a plugin draws (``world.draws``) only the window is seeded, and a run's
first window looks whether that is true of the generator of the CPU.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from camshaft.errors import PluginError, Problem, RecipeError
from camshaft.state import State


def seed_step(state: State) -> None:
    """Seed torch's generators from (seed, step, part of the batch). Ranks that share their part draw alike."""
    world = state.world
    index = world.mesh.shape.batch_index(world.rank)
    _seed(f"{world.recipe.seed}/{state.step}/{index}", world.device)


def _seed(key: str, device: torch.device) -> None:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class Seeds:
    """Seeds the forwards of one rank while the model trains. Layers inside of a larger compiled piece are not seeded
    one by one: they follow from where the piece begins.
    """

    def __init__(self, state: State) -> None:
        world = state.world
        self._state, self._device = state, world.device
        self._seed, self._part = world.recipe.seed, world.mesh.shape.batch_index(world.rank)
        self._calls: Counter[str] = Counter()
        self._repeated: set[str] = set()
        self._backward = False
        self._draws = world.draws
        self._look = not world.draws
        self._look_always = self._look and world.recipe.debug.contracts
        self._before: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        layers = getattr(getattr(state.model, "pipeline", None), "layers", None)
        if not self._draws or layers is None or any(f"{layers}.".startswith(f"{piece}.") for piece in world.pieces):
            return
        for number, layer in state.model.get_submodule(layers)._modules.items():
            if layer is not None:  # outside of any forward that a plugin has put on it: what runs again runs as it ran
                self._handles.append(layer.register_forward_pre_hook(partial(self._enter, number)))

    def close(self) -> None:
        """Take the hooks from the layers."""
        while self._handles:
            self._handles.pop().remove()

    def start_window(self) -> None:
        """The window is seeded, and nothing has run yet."""
        if self._look:  # not at a device's generator: some kernels count draws there that they do not make
            self._before = torch.get_rng_state()

    def end_window(self) -> None:
        """Every forward and backward of the window has run.

        Raises:
            PluginError: random numbers were drawn, and nobody had said so.
        """
        if self._before is None:
            return
        if not torch.equal(self._before, torch.get_rng_state()):
            raise PluginError(
                "?",
                "draws",
                "random numbers were drawn during a window's forwards and backwards, but the model and every plugin of "
                "the recipe say that they draw none: say `draws = True` in the class of the plugin that does, or draw "
                "from a generator of your own",
            )
        self._before, self._look = None, self._look_always

    def begin(self) -> None:
        """A microbatch's forward begins, of the step and microbatch that ``state`` names."""
        if not self._draws:
            return
        self._backward = False
        self._calls.clear()
        self._set("")

    def begin_backward(self) -> None:
        """Layers that run from here on run again."""
        self._backward = True

    def _set(self, place: str) -> None:
        state = self._state
        _seed(f"{self._seed}/{state.step}/{self._part}/{state.microbatch}/{place}", self._device)

    def _enter(self, number: str, layer: Module, arguments: tuple[Any, ...]) -> None:
        """A layer that runs several times in one forward draws other numbers each time."""
        if torch.compiler.is_compiling() or not self._state.model.training:
            return
        if self._backward:
            self._refuse_repeated(number, layer)
            self._set(f"{number}.0")
            return
        times = self._calls[number]
        self._calls[number] += 1
        if times:
            self._repeated.add(number)
        self._set(f"{number}.{times}")

    def _refuse_repeated(self, number: str, layer: Module) -> None:
        if number in self._repeated:
            raise RecipeError(
                Problem(
                    f"layer {number} ({type(layer).__name__}) runs several times in a forward, and again in backward "
                    "as a part of a larger module: nobody can tell which random numbers it had",
                    fix="let the layers themselves be recomputed, or smaller modules",
                )
            )
