"""Whether a model has what a recipe names, by the names of its modules. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from camshaft.errors import Problem
from camshaft_recompute.options import Options
from camshaft_recompute.patterns import chosen, number


def faults(names: Sequence[str], patterns: Sequence[str], options: Options, key: str) -> Iterator[Problem]:
    """What ``options`` name and a model lacks whose modules are ``names``; ``patterns`` are those of the modules."""
    strange = [each for each in enumerate(options.modules or ()) if not chosen(names, [each[1]])]
    for index, pattern in strange:
        yield Problem(
            f"no module is called '{pattern}'; there are, for example, {', '.join(_examples(names))}",
            key=f"{key}.modules.{index}",
            fix="take a pattern of names as model.named_modules() has them, `*` for any one level",
        )
    there = {number(name) for name in chosen(names, patterns)}
    missing = [] if strange else [each for each in enumerate(options.layers or ()) if each[1] not in there]
    for index, layer in missing:
        yield Problem(
            f"the modules chosen have no layer {layer}; they are {_span(there)}",
            key=f"{key}.layers.{index}",
            fix="number layers from 0, or leave layers out",
        )
    some = strange or missing or options.every is None or chosen(names, patterns, options.every, options.layers)
    if not some:
        yield Problem(
            f"'every' is {options.every}, and none of the modules chosen is in a layer whose number it divides",
            key=f"{key}.every",
            fix="remove every, or choose layers that it divides, or modules of layers",
        )


def _examples(names: Sequence[str]) -> list[str]:
    """Of each shape of name one, numbers as stars."""
    forms = dict.fromkeys(".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names)
    return list(forms)[:6]


def _span(numbers: set[int | None]) -> str:
    known = sorted(each for each in numbers if each is not None)
    return "without numbers" if not known else f"{known[0]} to {known[-1]}"
