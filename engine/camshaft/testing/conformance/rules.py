"""Which standard tests a plugin has to pass, and what may be put in their place: nothing without a stated reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import getattr_static
from math import prod
from typing import Any

KINDS = ("observer", "reducer", "sharder", "schedule", "kernel", "optimizer")
ONLY = {
    "test_frozen_and_unused_parameters": {"reducer", "sharder", "optimizer", "schedule"},
    "test_the_schedule_is_sound_for_every_size": {"schedule"},
    "test_kernels_match_fp64": {"kernel"},
}
"""Tests that are for some kinds alone; all others are for every plugin."""
SETTINGS = ("ranks", "bounds", "compute", "max_norm", "microbatches")
"""Attributes that weaken tests where they are not the standard's, and so need a reason too."""
PARTS = (
    "check_parity", "inspected", "limits", "neighbours", "reference", "several", "sizes", "trial",
    "pytest_generate_tests", "_optimizer", "_options", "_own_reference",
)  # fmt: skip
"""What standard tests are made of: who puts something else in its place has changed all tests that use it."""

OF_OTHERS = {"kernels": "kernel", "optimizer": "optimizer", "schedule": "schedule"}
"""Hook to the kind of plugins that have it."""
DIVIDED = ("gradient.reduce", "gradient.layout", "parameter.layout", "optimizer.layout")
"""Resources of reducers and sharders."""


def more_than(kind: str, hooks: Iterable[str], resources: Iterable[str]) -> list[str]:
    """What of a plugin has tests of its own, of which an ``observer``, which it is said to be, has none."""
    if kind != "observer":
        return []
    own = [f"it implements {hook}, as kind '{OF_OTHERS[hook]}' does" for hook in sorted(hooks) if hook in OF_OTHERS]
    claims = [f"it claims {each}, as 'reducer' or 'sharder' does" for each in sorted(resources) if each in DIVIDED]
    return own + claims


def fixed(recipe: Mapping[str, Any]) -> int:
    """Ranks that the degrees of ``recipe`` multiply to, without data ranks that nobody has said the number of."""
    degrees = recipe.get("parallel", {})
    names = ("tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel_shard")
    return prod(degrees.get(name) or 1 for name in names)


def apply(cls: type[Any], standard: type[Any]) -> None:
    """Leave out what is not for the class' kind, and refuse what is changed without a reason.

    Raises:
        TypeError: a kind, a name in ``except_for`` or a change that is not allowed.
    """
    tests = [name for name in vars(standard) if name.startswith("test_")]
    if cls.kind not in KINDS:
        raise TypeError(f"{cls.__name__}.kind is '{cls.kind}'; there are: {', '.join(KINDS)}")
    known = {*tests, *SETTINGS, *PARTS}
    for name, reason in cls.except_for.items():
        if name not in known:
            raise TypeError(f"{cls.__name__}.except_for names '{name}'; there are: {', '.join(sorted(known))}")
        if not (isinstance(reason, str) and len(reason.split()) >= 3):
            raise TypeError(f"{cls.__name__}.except_for['{name}'] must be a reason in words")
    for name in known:
        meant = name not in tests or cls.kind in ONLY.get(name, {cls.kind})
        own = getattr_static(standard, name)
        if name in tests and meant and getattr_static(cls, name) is None and name not in vars(cls):
            setattr(cls, name, own)  # its parent is of a kind that does not have this test
        changed = getattr_static(cls, name) is not own
        if changed and meant and name not in cls.except_for:
            raise TypeError(
                f"{cls.__name__} changes '{name}' of the standard: say why, except_for = {{'{name}': 'the reason'}}"
            )
        if not meant:
            setattr(cls, name, None)  # pytest collects no None
        elif name in tests and name in cls.except_for and not changed:
            setattr(cls, name, _excused(cls.except_for[name]))


def _excused(reason: str) -> Callable[[Any], None]:
    def test(self: Any) -> None:
        import pytest

        pytest.skip(reason)

    return test
