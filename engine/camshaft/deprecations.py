"""Every hook that is on its way out, and every one that is gone: the one place where that is written.

The hook API has a number (``camshaft.HOOK_API``, which ``camshaft plan`` shows). A new hook, or a new parameter of one,
leaves the number as it is: a plugin need not implement or take it. A hook that goes away is named here one minor
release before: until then it works, and whoever implements it is warned by name. With its removal the number goes up,
and plugins for the old one are refused by name until they are released again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass


class HookDeprecated(FutureWarning):
    """A plugin implements a hook that the next minor release removes; shown to users by default."""


@dataclass(frozen=True)
class Deprecation:
    """A hook's end: the minor releases in which it is warned of and removed, such as ``0.2`` and ``0.3``."""

    since: str
    removed: str
    instead: str
    """What to use in its place, as the end of a sentence that begins with 'use'."""


DEPRECATED: Mapping[str, Deprecation] = {}
"""Hooks that still work."""
REMOVED: Mapping[str, Deprecation] = {}
"""Hooks that do not exist any more; the message for a plugin that still has one."""


def warn(plugin: str, hook: str) -> None:
    """Warn of ``hook`` if it is on its way out."""
    found = DEPRECATED.get(hook)
    if found is not None:
        warnings.warn(
            f"plugin '{plugin}' implements the hook '{hook}', which Camshaft {found.removed} removes (deprecated since "
            f"{found.since}): use {found.instead}",
            HookDeprecated,
            stacklevel=2,
        )


def told(hook: str) -> str:
    """What to say of a hook that does not exist; empty where it never did."""
    found = REMOVED.get(hook)
    return "" if found is None else f"; it was removed in Camshaft {found.removed}: use {found.instead}"
