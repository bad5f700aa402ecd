"""What the numbers of a proof follow from beside its recipe: versions of packages, and every line of their code."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from camshaft.host import distribution, installed, packages, plugin_class
from camshaft.schedules import offered

_LARGE = 1 << 22
"""Bytes of a file (of a compiled library, say) from which on its size and its time stand for what is in it."""


def versions(sections: Mapping[str, Any]) -> dict[str, str]:
    """Versions of Python, torch and the core, of the distribution of each plugin, and of all that those depend on.

    ``sections``: plugin to its section. Extra dependencies count where they are called like a plugin of the recipe.
    Imports no torch.
    """
    from camshaft.cli import inventory

    version = inventory.version
    points = installed()
    named = {name: points[name] for name in sections if name in points}
    found = {
        "python": platform.python_version(),
        "torch": version("torch") or "",
        "camshaft": version("camshaft") or "",
        **{f"plugin {name}": distribution(point) for name, point in named.items()},
    }
    owners = {point.dist.name for point in named.values() if point.dist is not None} | {"camshaft"}
    needed = {each for owner in owners for each in _requirements(owner, set(sections))}
    used = {each: version(each) for each in sorted(needed)} | inventory.packages(packages(named))
    return found | {f"package {each}": told for each, told in used.items() if told is not None}


def _requirements(owner: str, extras: set[str]) -> Iterator[str]:
    try:
        lines = importlib.metadata.requires(owner) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        if extra is None or extra[1] in extras:
            yield re.split(r"[^A-Za-z0-9._-]", line.strip(), maxsplit=1)[0].lower()


def code_digest(sections: Mapping[str, Any]) -> str:
    """Digest of every file of the core and of the packages of plugins: a version number may cover many of them.

    With them go the packages of classes that plugins inherit from, and of schedules that their sections name.
    """
    found = hashlib.sha256()
    for package in dict.fromkeys(_packages(sections)):
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        for folder in spec.submodule_search_locations or []:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    found.update(f"{package}/{path.relative_to(folder)}\0".encode() + _content(path))
        if spec.submodule_search_locations is None and spec.origin is not None:  # a package that is one file
            found.update(f"{package}\0".encode() + _content(Path(spec.origin)))
    return found.hexdigest()


def _packages(sections: Mapping[str, Any]) -> Iterator[str]:
    yield "camshaft"
    for name in sections:
        for each in plugin_class(name).__mro__:
            if each is not object:
                yield each.__module__.split(".")[0]
    words = set(_words(sections.values()))
    for name, point in offered().items():
        if name in words:
            yield point.value.partition(":")[0].split(".")[0]


def files(values: Iterable[Any], *folders: Path) -> dict[str, str]:
    """Digest of each file that a string in ``values`` names, as a path from one of ``folders`` on."""
    found: dict[str, str] = {}
    for word in _words(values):
        for folder in folders:
            with contextlib.suppress(OSError, ValueError):  # what is no path at all
                if (folder / word).is_file():
                    found[word] = hashlib.sha256(_content(folder / word)).hexdigest()
    return found


def _words(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _words(value.values())
        elif isinstance(value, list | tuple):
            yield from _words(value)


def _content(path: Path) -> bytes:
    told = path.stat()
    return path.read_bytes() if told.st_size <= _LARGE else f"{told.st_size} {told.st_mtime_ns}".encode()
