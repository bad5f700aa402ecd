"""Which modules are compiled, and their forwards."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module, ModuleDict, ModuleList

from camshaft.errors import CamshaftError, Problem, RecipeError
from camshaft_compile import naming
from camshaft_compile.rules import CUDA_GRAPHS

if TYPE_CHECKING:
    from camshaft.state import World
    from camshaft_compile import Options

Call = Callable[..., Any]
Marks = frozenset[object]
CONTAINERS = (ModuleList, ModuleDict)
"""Modules without a forward of their own: nobody calls them."""


class Blocks:
    """Modules with a compiled forward beside their own; ``begin`` makes them use it.

    Raises:
        RecipeError: a pattern that matches nothing, a module inside of another, or an unknown backend.
    """

    def __init__(self, options: Options, world: World, model: Module, plugin: str) -> None:
        self._key = f"plugins.{plugin}"
        self._running = False
        self.graphs = options.cuda_graphs or options.backend == CUDA_GRAPHS
        """Whether calls are replayed as CUDA graphs."""
        _check_backend(options.backend, self._key)
        self.names = chosen(options, model, self._key, whole=not world.stages)
        self._modules = [model.get_submodule(name) for name in self.names]
        if options.backend == "inductor" and options.cache_dir is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = options.cache_dir  # torch itself sets it, so being set says nothing
        _quieten()
        self._before = [vars(module).get("forward") for module in self._modules]
        self._inside = {name: _marks(module) for name, module in zip(self.names, self._modules, strict=True)}
        for name, module, own in zip(self.names, self._modules, self._before, strict=True):
            # What recomputes is one graph or nothing: torch's selective checkpoints outside of one hold results that
            # exchanges between ranks then overwrite.
            module.forward = self._forward(name, module.forward, arguments(options, whole=own is not None))
        world.pieces.update(self.names)

    @property
    def compiled(self) -> bool:
        """Whether compiled code runs."""
        return self._running

    def begin(self) -> None:
        """Use compiled code from now on."""
        self._running = True

    def check(self, model: Module) -> None:
        """Refuse what others put inside of compiled modules since: it would not run, or break the graph.

        Raises:
            RecipeError: names the module.
        """
        for name, module in zip(self.names, self._modules, strict=True):
            for inner, marks in _marks(module).items():
                if marks - self._inside[name].get(inner, frozenset()):
                    raise RecipeError(
                        Problem(
                            f"a plugin put a hook or a forward on '{name}.{inner}', inside of '{name}', after that was "
                            "compiled as one (split backwards of a pipeline do so, and storage that gathers parts of "
                            "a layer)",
                            key=self._key,
                            fix=f"choose smaller modules with {self._key}.modules, or change that plugin's options, "
                            f"or set {self._key}=null",
                        )
                    )

    def _uncompilable(self, name: str, error: Exception) -> CamshaftError:
        return CamshaftError(
            f"'{name}' cannot be compiled as one graph: {error}\n"
            f"Choose smaller modules with {self._key}.modules, set {self._key}.fullgraph=false if it is true, or "
            f"train uncompiled with {self._key}=null"
        )

    def close(self) -> None:
        """Give the modules the forwards back that they had."""
        self._running = False
        for module, before in zip(self._modules, self._before, strict=True):
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before
        self._modules, self._before = [], []

    def _forward(self, name: str, inner: Call, named: dict[str, Any]) -> Call:
        compiled: Call = torch.compile(inner, **named)

        def forward(*arguments: Any, **keywords: Any) -> Any:
            if not self._running:
                return inner(*arguments, **keywords)
            try:
                return compiled(*arguments, **keywords)
            except Exception as error:
                if not type(error).__module__.startswith("torch._dynamo"):
                    raise
                raise self._uncompilable(name, error) from error

        return forward


def _check_backend(name: str, key: str) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise RecipeError(naming.unknown_backend(name, known, f"{key}.backend"))


def _quieten() -> None:
    """Torch warns of what its own compiler does: it looks for gradients of inputs that cannot have one, and uses parts
    of torch that are deprecated. Nobody can change anything there.
    """
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning, "torch")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")


def arguments(options: Options, *, whole: bool = False) -> dict[str, Any]:
    """Those of ``torch.compile``; ``whole``: graph breaks are errors in any case."""
    named: dict[str, Any] = {
        "backend": options.backend,
        "dynamic": options.dynamic,
        "fullgraph": options.fullgraph or whole,
    }
    if options.backend == "inductor":
        named["mode"] = "reduce-overhead" if options.cuda_graphs else options.mode
    return named


def chosen(options: Options, model: Module, key: str, *, whole: bool = True) -> list[str]:
    """Names of the modules to compile, in the model's order; none inside of another.

    ``whole``: all of the model is on this rank, so that every pattern has to match.
    """
    names = [name for name, module in model.named_modules() if name and not isinstance(module, CONTAINERS)]
    problems = tuple(naming.faults(names, options.modules, f"{key}.modules", whole=whole))
    if problems:
        raise RecipeError(problems)
    return naming.chosen(names, options.modules or _layers(model, key))


def _layers(model: Module, key: str) -> list[str]:
    """A glob for the members of the list of layers that the model tells of."""
    pipeline = getattr(model, "pipeline", None)
    if pipeline is None:
        raise RecipeError(
            Problem(
                f"{type(model).__name__} does not tell what its layers are (attribute `pipeline`)",
                key=f"{key}.modules",
                fix=f"name the modules to compile, for example {key}.modules=['layers.*']",
            )
        )
    return [f"{pipeline.layers}.*"]


def _marks(module: Module) -> dict[str, Marks]:
    """Hooks and forwards on each module inside of ``module``, so that new ones show."""
    return {
        name: frozenset(
            [
                *(("before", number) for number in inner._forward_pre_hooks),
                *(("after", number) for number in inner._forward_hooks),
                *(("forward", id(own)) for own in (vars(inner).get("forward"),) if own is not None),
            ]
        )
        for name, inner in module.named_modules()
        if name
    }
