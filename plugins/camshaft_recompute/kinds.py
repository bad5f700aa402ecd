"""Operations by what they are, as ``save`` of the recipe calls them, and what keeping the result of one asks for.

The one place that reads an operation's schema and tags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch

from camshaft_recompute.patterns import KINDS

Operation = Any
"""``torch._ops.OpOverload``, which has no public name; under a compiler also one of a higher order, such as the launch
of a Triton kernel, which has neither schema nor overloads."""
Keep = Callable[[Operation], bool]

UNTYPED_VIEWS = frozenset({"aten._unsafe_view", "aten.detach", "aten._reshape_alias", "aten.alias"})
"""Results that share memory with an argument though autograd need not know."""
FACTORIES = (
    "aten.empty*", "aten.zeros*", "aten.ones*", "aten.full*", "aten.new_*", "aten.arange*", "aten.lift*", "aten.clone",
    "aten._to_copy",
)  # fmt: skip
"""Memory that is made to be written into, by kernels too that torch knows nothing of (an autograd function may launch
one of its own over a copy): kept, it would come back with what was written."""


def name_of(operation: Operation) -> str:
    """``aten.mm`` for ``aten.mm.default``."""
    return str(getattr(operation, "overloadpacket", f"higher_order.{operation}"))


@lru_cache(maxsize=4096)
def shares(operation: Operation) -> bool:
    """Whether the result is memory of an argument."""
    return bool(getattr(operation, "is_view", False)) or name_of(operation) in UNTYPED_VIEWS


@lru_cache(maxsize=4096)
def exchanges(operation: Operation) -> bool:
    """Whether ranks exchange something: memory that it is given may be written at any time."""
    return getattr(operation, "namespace", "") in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")


@lru_cache(maxsize=4096)
def writes(operation: Operation) -> bool:
    """Whether memory of an argument may be written; of what has no schema nobody can tell that it is not."""
    schema = getattr(operation, "_schema", None)
    return schema is None or bool(schema.is_mutable) or exchanges(operation)


@lru_cache(maxsize=4096)
def makes(operation: Operation) -> bool:
    """Whether its results are new memory that it alone writes."""
    name = name_of(operation)
    return not (shares(operation) or writes(operation) or any(fnmatchcase(name, pattern) for pattern in FACTORIES))


def draws(operation: Operation, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether this call draws random numbers: kept, it would leave the generator where it was for who draws next."""
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return False
    names = [each.name for each in operation._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    rate = named.get("dropout_p", arguments[place] if place < len(arguments) else 0.0)
    return bool(rate)


def unknown(words: Iterable[str]) -> list[str]:
    """Those of ``words`` that name an operation of torch's own which it does not have. Libraries may come later."""
    named = (word for word in words if word.startswith("aten.") and not any(sign in word for sign in "*?["))
    return [word for word in named if not hasattr(torch.ops.aten, word.split(".")[1])]


def of_kinds(words: Iterable[str]) -> Keep:
    """A test for operations of ``words``: kinds, and names such as ``aten.mm`` or ``library.*``."""
    patterns = tuple(pattern for word in words for pattern in KINDS.get(word, (word,)))

    @lru_cache(maxsize=4096)
    def keep(operation: Operation) -> bool:
        name = name_of(operation)
        return makes(operation) and any(fnmatchcase(name, pattern) for pattern in patterns)

    return keep
