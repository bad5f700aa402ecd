"""Which modules of a model are asked for."""

from __future__ import annotations

from torch.nn import Module, ModuleList

from camshaft.errors import Problem, RecipeError
from camshaft_recompute.options import Options
from camshaft_recompute.patterns import chosen, number


def find(model: Module, options: Options, name: str, *, whole: bool) -> dict[str, Module]:
    """Modules by name. ``whole``: the model has all of its layers on this rank, so all that is named must be there.

    Raises:
        RecipeError: a pattern or a layer that the whole model lacks.
    """
    modules = {each: module for each, module in model.named_modules() if each}
    patterns = options.modules or _layers(model, modules)
    found = chosen(modules, patterns, options.every, options.layers)
    if whole:
        _check(list(modules), found, patterns, options, f"plugins.{name}")
    return {each: modules[each] for each in found}


def _layers(model: Module, modules: dict[str, Module]) -> list[str]:
    """Patterns of the layers: those that the model names for a pipeline, else members of its ModuleLists."""
    pipeline = getattr(model, "pipeline", None)
    if pipeline is not None:
        return [f"{pipeline.layers}.*"]
    return [f"{name}.*" for name, module in modules.items() if isinstance(module, ModuleList)]


def _check(names: list[str], found: list[str], patterns: list[str], options: Options, key: str) -> None:
    if options.modules is not None:
        for pattern in patterns:
            if not chosen(names, [pattern]):
                raise RecipeError(
                    Problem(
                        f"no module is called '{pattern}'; there are, for example, {', '.join(_examples(names))}",
                        key=f"{key}.modules",
                        fix="take a pattern of names as model.named_modules() has them, `*` for any one level",
                    )
                )
    there = {number(name) for name in chosen(names, patterns)}
    missing = sorted(set(options.layers or ()) - there)
    if missing:
        raise RecipeError(
            Problem(
                f"the modules chosen have no layer {missing[0]}; they are {_span(there)}",
                key=f"{key}.layers",
                fix="number layers from 0, or leave layers out",
            )
        )


def _examples(names: list[str]) -> list[str]:
    """Of each shape of name one, numbers as stars."""
    forms = dict.fromkeys(".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names)
    return list(forms)[:6]


def _span(numbers: set[int | None]) -> str:
    known = sorted(each for each in numbers if each is not None)
    return "without numbers" if not known else f"{known[0]} to {known[-1]}"
