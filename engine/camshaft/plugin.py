"""What a plugin is: a class with ``Options`` and hook implementations. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pluggy
from pydantic import BaseModel, ConfigDict

HOOK_API = 1
"""Number of the hook interface. A plugin that was written for another one is refused by name."""

PROJECT = "camshaft"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Options(BaseModel):
    """Base of a plugin's section in the recipe: unknown keys and wrong types are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Plugin:
    """Base of every plugin. The host sets ``name`` to the entry point's name, which is the recipe's key.

    Keep the module that holds the class free of torch: ``validate`` and ``plan`` load it without torch.
    Import what needs torch inside the hook implementations.
    """

    hook_api: ClassVar[int] = HOOK_API
    Options: ClassVar[type[Options]] = Options
    commands: ClassVar[Mapping[str, str]] = {}
    """What it does outside of a run: a command to ``module:function``, which is imported only then. ``bench`` gets the
    words behind ``camshaft bench <plugin>``; ``doctor`` yields (whether all is well, what, what was found)."""
    usual: ClassVar[Mapping[str, str]] = {}
    """What it is the usual choice for, to its section then: a slot (``optimizer``), a hook whose answers it takes
    (``kernels``) or a key of ``parallel``. Told where a recipe lacks that, and taken by what ``new-plugin`` writes."""
    taken: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Names that its options understand by themselves, by the kind of what bears them (``schedule``, ``kernel``):
    another package's would never be asked."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Packages that it can make use of, module to distribution: their versions are kept with runs and proofs."""
    draws: ClassVar[bool] = True
    """Whether a forward may draw random numbers because of it. Where no plugin of a recipe does, nor the model, what
    only they need is left out (seeds of each microbatch and layer)."""
    name: str = ""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options
