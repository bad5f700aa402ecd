"""Options of ``recompute``, and which of them mean nothing together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

import camshaft
from camshaft.errors import Problem
from camshaft_recompute import operations
from camshaft_recompute.patterns import KINDS

Mode = Literal["none", "selective", "full", "offload"]


class Options(camshaft.Options):
    """What is made again in backward, or waits on the host."""

    mode: Mode = "selective"
    """`full`: a module keeps its inputs alone and runs again in backward; `selective`: results of some operations are
    kept too; `offload`: nothing runs again, what is kept waits in the host's memory; `none`: everything is kept."""
    modules: list[str] | None = None
    """Patterns of module names, `*` within one level (`model.layers.*.mlp`). What is inside of a chosen module belongs
    to it. Default: the model's layers."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Of layers, those whose number it divides: 2 takes every second one, from the first."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Numbers of layers, from 0. With `every`: those that both name."""
    save: list[str] | None = None
    """Selective: what is kept: `products`, `batched_products`, `attention`, `softmax`, `activations`, `norms`, or
    patterns of operations (`aten.mm`, `my_library.*`). Default: `products`."""
    budget_gib: Annotated[float, Field(ge=0, le=2**20)] | None = None
    """Selective, instead of `save`: GiB that chosen modules of a rank may keep of one microbatch. Each operation is
    timed and sized in the first microbatch, and the results that save most time a byte are kept from the second step
    on."""
    budget_bytes: Annotated[int, Field(ge=0, le=2**50)] | None = None
    """The same in bytes."""
    offload_from_kib: Annotated[float, Field(ge=0, le=2**30)] | None = None
    """Offload: smaller tensors stay. Default: 256."""

    @property
    def budget(self) -> int | None:
        """Bytes, or None where no budget is given."""
        if self.budget_gib is not None:
            return int(self.budget_gib * 2**30)
        return self.budget_bytes

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is kept, as far as no budget decides."""
        return ("products",) if self.save is None else tuple(self.save)


def problems(options: Options, name: str, plugins: tuple[str, ...]) -> Iterator[Problem]:
    """Options that mean nothing, each with a fix. ``plugins``: all that the recipe enables."""
    key, mode = f"plugins.{name}", options.mode
    budgets = [each for each in ("budget_gib", "budget_bytes") if getattr(options, each) is not None]
    for each in ("save", *budgets):
        if getattr(options, each) is not None and mode != "selective":
            yield Problem(
                f"'{each}' says what is kept beside inputs, and with mode '{mode}' nothing is chosen",
                key=f"{key}.{each}",
                fix=f"set {key}.mode=selective, or remove {each}",
            )
    if options.offload_from_kib is not None and mode != "offload":
        yield Problem(
            f"'offload_from_kib' is about mode 'offload', and the mode is '{mode}'",
            key=f"{key}.offload_from_kib",
            fix=f"set {key}.mode=offload, or remove offload_from_kib",
        )
    if len(budgets) == 2:
        yield Problem("the budget is given twice", key=f"{key}.budget_bytes", fix="remove budget_bytes")
    if budgets and options.save is not None:
        yield Problem(
            "'save' says what is kept, and so does the budget's choice",
            key=f"{key}.save",
            fix=f"remove save, or remove {budgets[0]}",
        )
    yield from _lists(options, key)
    if "compile" in plugins and (budgets or mode == "offload"):
        what = budgets[0] if budgets else "mode 'offload'"
        yield Problem(
            f"{what} works on operations as they run one by one, and a compiled module has none of them",
            key=key,
            fix="take mode 'full' or 'selective' with 'save', or remove 'compile' (plugins.compile=null)",
        )


def _lists(options: Options, key: str) -> Iterator[Problem]:
    for each in ("modules", "layers", "save"):
        if getattr(options, each) == []:
            yield Problem(f"'{each}' is empty, and nothing would be {'kept' if each == 'save' else 'chosen'}",
                          key=f"{key}.{each}", fix=f"remove {each}, or name at least one")  # fmt: skip
    for word in options.save or ():
        if word not in KINDS and "." not in word and "*" not in word:
            yield Problem(
                f"'{word}' is no kind of operation; there are: {', '.join(KINDS)}",
                key=f"{key}.save",
                fix=f"take one of {', '.join(KINDS)}, or the name of an operation such as aten.mm",
            )
    yield from operations.faults(options.save or (), f"{key}.save")
