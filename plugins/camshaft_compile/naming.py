"""What a recipe names, modules and backends, against what there is. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from importlib.util import find_spec

from camshaft.errors import Problem
from camshaft.host import installed

TORCHS_OWN = frozenset(
    {
        "aot_eager", "aot_eager_decomp_partition", "aot_eager_decomp_partition_crossref",
        "aot_eager_decomp_partition_with_mode", "aot_eager_default_partitioner", "aot_ts", "cudagraphs",
        "eager", "eager_debug", "eager_noexcept",
        "inductor", "invoke_subgraph", "openxla", "openxla_eval", "pre_dispatch_eager", "ts", "tvm",
    }
)  # fmt: skip
"""Backends that torch 2.11 to 2.13 brings along, without those that are for its own tests and tools."""
NEEDED = {"openxla": "torch_xla", "openxla_eval": "torch_xla", "tvm": "tvm"}
"""Packages without which some of them fail."""
GROUP = "torch_dynamo_backends"
"""Entry points through which torch finds those of other packages."""


def chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Modules among ``names`` that a pattern matches."""
    return [name for name in names if any(_matches(name, pattern) for pattern in patterns)]


def faults(names: Sequence[str], patterns: Sequence[str], key: str, *, whole: bool = True) -> Iterator[Problem]:
    """Patterns of the option under ``key`` that match none of ``names``, and modules inside of one another.

    ``whole``: ``names`` are those of the whole model.
    """
    for index, pattern in enumerate(patterns):
        if whole and not chosen(names, [pattern]):
            yield Problem(
                f"the pattern '{pattern}' matches no module",
                key=f"{key}.{index}",
                fix="write names as model.layers.* or model.layers.*.mlp; a * stands for one level",
            )
    found = dict.fromkeys(chosen(names, patterns))
    for name, outer in ((name, around(name, found)) for name in found):
        if outer is not None:
            yield Problem(
                f"'{name}' is inside of '{outer}', and both are to be compiled", key=key, fix="choose one of them"
            )
            return


def around(name: str, others: Collection[str]) -> str | None:
    """The outermost of ``others`` that module ``name`` is inside of."""
    parts = name.split(".")
    outer = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((each for each in outer if each in others), None)


def _matches(name: str, pattern: str) -> bool:
    """Level by level: a ``*`` matches no dot."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def backend_faults(name: str, plugins: Sequence[str], own: str, key: str) -> Iterator[Problem]:
    """Whether torch will know the backend ``name``. ``plugins``: all of the recipe; ``own``: this one.

    A plugin of another package may register one when it is built: then nobody can tell before.
    """
    package = NEEDED.get(name)
    if package is not None and find_spec(package) is None:
        yield Problem(
            f"the backend '{name}' needs the package {package}, which is not installed",
            key=key,
            fix="install it, or remove backend for inductor",
        )
    known = TORCHS_OWN | {point.name for point in entry_points(group=GROUP)}
    if name not in known and not any(_foreign(each, own) for each in plugins):
        yield unknown_backend(name, sorted(known), key)


def unknown_backend(name: str, known: Sequence[str], key: str) -> Problem:
    """The fault of a backend that torch does not know."""
    return Problem(
        f"torch knows no backend '{name}'; there are: {', '.join(known)}",
        key=key,
        fix="set it to one of them, or remove it for inductor",
    )


def _foreign(plugin: str, own: str) -> bool:
    """Whether ``plugin`` is of another package than ``own``."""
    points = [installed().get(each) for each in (plugin, own)]
    names = [None if point is None or point.dist is None else point.dist.name for point in points]
    return names[0] is None or names[0] != names[1]
