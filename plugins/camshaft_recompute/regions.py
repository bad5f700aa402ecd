"""Which modules of a model are asked for."""

from __future__ import annotations

from torch.nn import Module, ModuleDict, ModuleList

from camshaft.errors import RecipeError
from camshaft_recompute.naming import faults
from camshaft_recompute.options import Options
from camshaft_recompute.patterns import chosen


def find(model: Module, options: Options, name: str, *, whole: bool) -> dict[str, Module]:
    """Modules by name. ``whole``: the model has all of its layers on this rank, so all that is named must be there.

    Raises:
        RecipeError: a pattern or a layer that the whole model lacks.
    """
    everything = {each: module for each, module in model.named_modules() if each}
    patterns = options.modules or _layers(model, everything)
    # Nobody calls what only holds others.
    modules = {each: one for each, one in everything.items() if not isinstance(one, (ModuleList, ModuleDict))}
    problems = tuple(faults(list(modules), patterns, options, f"plugins.{name}")) if whole else ()
    if problems:
        raise RecipeError(problems)
    return {each: modules[each] for each in chosen(modules, patterns, options.every, options.layers)}


def _layers(model: Module, modules: dict[str, Module]) -> list[str]:
    """Patterns of the layers: those that the model names for a pipeline, else members of its ModuleLists."""
    pipeline = getattr(model, "pipeline", None)
    if pipeline is not None:
        return [f"{pipeline.layers}.*"]
    return [f"{name}.*" for name, module in modules.items() if isinstance(module, ModuleList)]
