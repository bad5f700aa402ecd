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
    """What it does outside of a run: a command (``bench``) to ``module:function``, which gets the words behind
    ``camshaft bench <plugin>`` and is imported only then."""
    name: str = ""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options
