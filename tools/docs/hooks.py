"""``docs/hooks.md``: every hook in run order, with its exact arguments."""

from __future__ import annotations

import inspect

from camshaft.plugin import HOOK_API
from tools.docs.inventory import Hook, hooks, implementers
from tools.docs.order import RUN_ORDER

HEAD = f"""<!-- Generated from engine/camshaft/hookspecs.py by `make docs`. Do not edit. -->

# Hooks, in run order

A plugin is a class with `Options` and methods marked `@hookimpl`. Each method has the name of a hook from this page and
takes any of its arguments, by name; defaults and keyword-only parameters are refused, and so is a misspelt name. All
hooks here belong to hook API {HOOK_API}. [First plugin in ten minutes](plugins/first-plugin.md) shows one at work;
`camshaft hooks RECIPE` lists who implements what in a recipe of yours.

<picture>
  <source media="(prefers-color-scheme: dark)" srcset="images/run-dark.svg">
  <img alt="The hooks of a run in the order in which they are called" src="images/run-light.svg">
</picture>

| kind | meaning |
|---|---|
| collected | every plugin answers, the core uses all answers |
| slot | exactly one owner; two owners are an error that names both |
| chain | every plugin may change the object, in recipe order |
| event | every plugin is called, nothing is returned |
| middleware | each plugin wraps the callable once; the first plugin of the recipe is outermost |

Inside one hook, plugins are called in the order of the recipe (`close`: in reverse). Hooks of the build are called once
each. Hooks of the step are bound to plain callables when the run is built.
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD, "| # | hook | kind | shipped plugins that implement it |", "|---:|---|---|---|"]
    by_name = {hook.name: hook for hook in hooks()}
    for number, hook in enumerate(map(by_name.__getitem__, RUN_ORDER), start=1):
        who = ", ".join(f"`{name}`" for name in implementers(hook.name))
        lines.append(f"| {number} | [`{hook.name}`](#{_anchor(hook)}) | {hook.kind} | {who} |")
    family: type | None = None
    for hook in hooks():
        if hook.family is not family:
            family = hook.family
            lines += ["", f"## {_title(family)}", "", inspect.getdoc(family) or ""]
        lines += ["", *_section(hook)]
    return "\n".join(lines) + "\n"


def _title(family: type) -> str:
    return f"{family.__name__.removesuffix('Hooks')} hooks"


def _heading(hook: Hook) -> str:
    return f"{hook.name}({', '.join(hook.arguments)})"


def _anchor(hook: Hook) -> str:
    """GitHub's anchor of the heading: lower case, punctuation gone, spaces to hyphens."""
    kept = "".join(sign for sign in _heading(hook).lower() if sign.isalnum() or sign in " _-")
    return kept.replace(" ", "-")


def _section(hook: Hook) -> list[str]:
    return [
        f"### {_heading(hook)}",
        "",
        f"{hook.kind_text}. Since hook API {hook.since}.",
        "",
        "```python",
        "@hookimpl",
        f"{hook.signature}: ...",
        "```",
        "",
        hook.text.replace("``", "`"),
    ]
