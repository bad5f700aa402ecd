"""The plugin host: finds, loads, checks and links the plugins that a recipe names, and no others.

Pluggy links, it does not run: hooks are validated and collected here when a run is built (see ``bind``).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from camshaft import deprecations
from camshaft.errors import CamshaftError, MachineError, PluginError, Problem, RecipeError, is_out_of_memory
from camshaft.hookspecs import FAMILIES, SLOTS
from camshaft.plugin import HOOK_API, PROJECT, Plugin

if TYPE_CHECKING:
    from camshaft.contracts import Contracts

GROUP = "camshaft.plugins"


@cache
def installed() -> Mapping[str, EntryPoint]:
    """Entry points of every installed plugin by name. Nothing is imported.

    Raises:
        MachineError: two distributions offer the same name.
    """
    return by_name(entry_points(group=GROUP), "plugin")


def by_name(points: Iterable[EntryPoint], kind: str) -> dict[str, EntryPoint]:
    """Entry points in the order of their names. ``kind``: what they offer, for the message.

    Raises:
        MachineError: two distributions offer the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(points, key=lambda point: point.name):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise MachineError(
                f"{kind} '{point.name}' is offered twice: {other.value} ({distribution(other)}) and "
                f"{point.value} ({distribution(point)}). Uninstall one of them."
            )
    return found


def imported(point: EntryPoint) -> Any:
    """What an entry point offers.

    Raises:
        PluginError: it cannot be imported, for whatever reason.
    """
    try:
        return point.load()
    except Exception as error:
        raise PluginError(point.name, "import", f"{point.value} cannot be imported: {error}") from error


def distribution(point: EntryPoint) -> str:
    """Name and version of the distribution that an entry point belongs to."""
    return "unknown distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def plugin_class(name: str) -> type[Plugin]:
    """Import the plugin called ``name`` and return its class.

    Raises:
        RecipeError: nothing of that name is installed.
        PluginError: it cannot be imported, is no plugin, or was written for another hook API.
    """
    points = installed()
    if name not in points:
        near = get_close_matches(name, points, n=1)
        raise RecipeError(
            Problem(
                f"no plugin called '{name}' is installed"
                + (f". Did you mean '{near[0]}'?" if near else f" (installed: {', '.join(points)})"),
                key=f"plugins.{name}",
                fix=f"use '{near[0]}'" if near else f"install a package that offers '{name}', or remove the line",
            )
        )
    loaded = imported(points[name])
    if not (inspect.isclass(loaded) and issubclass(loaded, Plugin)):
        raise PluginError(name, "import", f"{points[name].value} is not a subclass of camshaft.Plugin")
    if loaded.hook_api != HOOK_API:
        raise PluginError(
            name,
            "import",
            f"written for hook API {loaded.hook_api}, and this Camshaft has {HOOK_API}: upgrade it",
        )
    return loaded


def classes() -> Iterator[tuple[str, type[Plugin]]]:
    """Name and class of every installed plugin. Those that cannot be loaded are left out."""
    for name in installed():
        with contextlib.suppress(PluginError):
            yield name, plugin_class(name)


def usual(need: str) -> tuple[str, str] | None:
    """The plugin that is the usual choice for a slot or a key of ``parallel``, and its section then; None: none is."""
    return next(((name, each.usual[need]) for name, each in classes() if need in each.usual), None)


def packages(names: Iterable[str]) -> dict[str, str]:
    """Packages that the plugins called ``names`` can make use of, module to distribution."""
    return {module: package for name in names for module, package in plugin_class(name).packages.items()}


class Host:
    """The plugins of one run, registered in recipe order."""

    watch: Contracts | None = None
    """Looks at what hooks write, once they are bound; None: nothing does."""

    def __init__(self, plugins: Mapping[str, Plugin]) -> None:
        self.plugins = dict(plugins)
        self.manager = pluggy.PluginManager(PROJECT)
        for family in FAMILIES:
            self.manager.add_hookspecs(family)
        for name, plugin in self.plugins.items():
            plugin.name = name
            self._check_signatures(name, plugin)
            self.manager.register(plugin, name=name)
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:  # _check_signatures names the usual cases first
            raise PluginError(self.manager.get_name(error.plugin) or "?", "register", str(error)) from error

    @classmethod
    def of(cls, sections: Mapping[str, Any], observers: Mapping[str, Plugin] | None = None) -> Host:
        """Instantiate the plugins of a recipe; ``sections`` maps a plugin's name to its options object."""
        plugins = {name: plugin_class(name)(options) for name, options in sections.items()}
        return cls({**plugins, **(observers or {})})

    def implementations(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        """(plugin, function) of every implementation of ``hook``, in recipe order.

        Each function accepts all of the hook's arguments by position, and puts plugin and hook into its errors.
        """
        names = _spec_parameters()[hook]
        found = {item.plugin_name: item for item in getattr(self.manager.hook, hook).get_hookimpls()}
        return [
            (name, guard(name, hook, _accept_all(found[name].function, found[name].argnames, names)))
            for name in self.plugins
            if name in found
        ]

    def owner(self, slot: str) -> tuple[str, Callable[..., Any]] | None:
        """The one owner of a slot, or None."""
        owners = self.implementations(slot)
        if len(owners) > 1:
            raise RecipeError(slot_problems({slot: [name for name, _ in owners]}))
        return owners[0] if owners else None

    def owners(self) -> dict[str, list[str]]:
        """Slot to the plugins that implement it; a legal recipe has at most one each."""
        return {slot: [name for name, _ in self.implementations(slot)] for slot in sorted(SLOTS)}

    def call(self, hook: str, *arguments: Any) -> list[tuple[str, Any]]:
        """Call every implementation in recipe order and return (plugin, result)."""
        return [(name, function(*arguments)) for name, function in self.implementations(hook)]

    def _check_signatures(self, plugin_name: str, plugin: Plugin) -> None:
        """What pluggy accepts in silence: misspelt names, unmarked methods, defaults, keyword-only parameters; and its
        options (wrappers, orders of its own), which binding would not follow.
        """
        specs = _spec_parameters()
        for name, method in inspect.getmembers(plugin, inspect.ismethod):
            if name.startswith("_"):
                continue
            marked = hasattr(method, f"{PROJECT}_impl")
            if not marked:
                if name in specs:
                    raise PluginError(plugin_name, name, f"'{name}' is a hook's name but is not marked @hookimpl")
                continue
            if name not in specs:
                near = get_close_matches(name, specs, n=1)
                hint = deprecations.told(name) or (f"; did you mean '{near[0]}'?" if near else "")
                raise PluginError(plugin_name, name, f"there is no hook called '{name}'{hint}")
            deprecations.warn(plugin_name, name)
            chosen = sorted(option for option, value in getattr(method, f"{PROJECT}_impl").items() if value)
            if chosen:
                raise PluginError(
                    plugin_name,
                    name,
                    f"@hookimpl takes no options here, got {', '.join(chosen)}: the recipe's order decides, and "
                    "around_... hooks wrap",
                )
            for parameter in inspect.signature(method).parameters.values():
                if parameter.default is not parameter.empty or parameter.kind is parameter.KEYWORD_ONLY:
                    raise PluginError(
                        plugin_name, name, f"parameter '{parameter.name}' has a default or is keyword-only"
                    )
                if parameter.name not in specs[name]:
                    raise PluginError(
                        plugin_name,
                        name,
                        f"there is no parameter '{parameter.name}'; the hook has ({', '.join(specs[name])})",
                    )


def guard(plugin: str, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Put plugin and hook into unexpected errors of ``function``; costs nothing while none is raised."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except CamshaftError:
            raise
        except Exception as error:
            if is_out_of_memory(error):  # has an exit status of its own
                raise
            raise PluginError(plugin, hook, f"{type(error).__name__}: {error}") from error

    return call


def slot_problems(owners: Mapping[str, list[str]]) -> list[Problem]:
    """Slots with two owners, and the required slot without one."""
    problems = [
        Problem(
            f"plugins {' and '.join(repr(name) for name in names)} both own the slot '{slot}': only one can",
            key=f"plugins.{names[-1]}",
            fix=f"remove one of them, for example with plugins.{names[-1]}=null",
        )
        for slot, names in owners.items()
        if len(names) > 1
    ]
    if "optimizer" in owners and not owners["optimizer"]:
        found = usual("optimizer")
        fix = "enable a plugin that owns it" if found is None else f"add plugins.{found[0]}: {found[1]}"
        problems.append(Problem("no plugin owns the slot 'optimizer'", key="plugins", fix=fix))
    return problems


@cache
def _spec_parameters() -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(inspect.signature(function).parameters)[1:]
        for family in FAMILIES
        for name, function in inspect.getmembers(family, inspect.isfunction)
    }


def _accept_all(function: Callable[..., Any], wanted: tuple[str, ...], offered: tuple[str, ...]) -> Callable[..., Any]:
    """Pluggy lets an implementation name fewer parameters than its spec; bound calls are positional."""
    if wanted == offered:
        return function
    indexes = tuple(offered.index(name) for name in wanted)
    if len(indexes) == 1:
        first = indexes[0]
        return lambda *arguments: function(arguments[first])
    return lambda *arguments: function(*(arguments[index] for index in indexes))
