"""Writes packages of plugins: ``camshaft new-plugin``. Templates are package data; nothing here imports torch."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from camshaft import HOOK_API, __version__
from camshaft.errors import MachineError, RecipeError
from camshaft.host import classes, installed, usual
from camshaft.schedules import offered

LICENSES = {"apache-2.0": "apache-2.0.in", "mit": "mit.in"}
_TEMPLATES = files(__package__) / "templates"
_NAME = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"
"""Of it pip's name is made, which ends with a letter or a digit, and in which runs of hyphens are one."""
_LONGEST = 64
_PLACE = re.compile(r"@@(\w+)@@")


@dataclass(frozen=True)
class Request:
    """What a user asked for."""

    name: str
    kind: str
    license: str = "apache-2.0"

    @property
    def distribution(self) -> str:
        """Name of the package for pip, and of its folder."""
        return f"camshaft-{self.name.replace('_', '-')}"

    @property
    def package(self) -> str:
        """Name of the Python package."""
        return f"camshaft_{self.name}"


@cache
def kinds() -> Mapping[str, Mapping[str, Any]]:
    """Kind to what is particular to it."""
    found: Mapping[str, Mapping[str, Any]] = yaml.safe_load(_text("kinds.yaml"))
    return found


def taken(kind: str) -> frozenset[str]:
    """Names that recipes know as another ``kind`` already: those of installed plugins' own."""
    return frozenset(name for _, plugin in classes() for name in plugin.taken.get(kind, ()))


def check_name(name: str) -> None:
    """Refuse a name that cannot be a plugin's here.

    Raises:
        RecipeError: with the reason and a fix.
    """
    if not re.fullmatch(_NAME, name):
        near = re.sub(r"[\W_]+", "_", name.lower(), flags=re.ASCII).lstrip("_0123456789").rstrip("_")
        hint = f", for example '{near}'" if near else ""
        raise RecipeError(
            f"'{name}' is no name of a plugin: take lower-case letters, digits and single underscores between them"
            f"{hint}"
        )
    if len(name) > _LONGEST:
        raise RecipeError(f"a name of {len(name)} characters is too long: take {_LONGEST} at most")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise RecipeError(f"'{name}' is a word of Python's own: choose another name")
    if name in installed() or name in offered():
        raise RecipeError(f"a plugin called '{name}' is installed already: choose another name, or uninstall it")
    if importlib.util.find_spec(f"camshaft_{name}") is not None:
        raise RecipeError(f"a package called 'camshaft_{name}' is installed already: choose another name")


def render(request: Request) -> dict[str, str]:
    """Path in the package's folder to text, of every file."""
    kind = kinds()[request.kind]
    words = _words(request, kind)
    found = {
        "pyproject.toml": "pyproject.toml.in",
        "README.md": "README.md.in",
        "LICENSE": LICENSES[request.license],
        ".gitignore": "gitignore.in",
        ".github/workflows/test.yml": "ci.yml.in",
        "recipe.yaml": "recipe.yaml.in",
        "tests/test_conformance.py": "conformance.py.in",
        **{f"{request.package}/{path}": template for path, template in kind["files"].items()},
    }
    made = {path: _fill(_text(template), words).rstrip("\n") + "\n" for path, template in found.items()}
    return {**made, f"{request.package}/py.typed": ""}


def write(request: Request, into: Path) -> Path:
    """Write the package into a new folder of ``into`` and return it; what exists is never touched.

    Raises:
        RecipeError: the name or the kind cannot be, or the folder exists.
        MachineError: it cannot be written.
    """
    if request.kind not in kinds():
        raise RecipeError(f"there is no kind '{request.kind}': use one of {', '.join(kinds())}")
    if request.license not in LICENSES:
        raise RecipeError(f"there is no license '{request.license}' here: use one of {', '.join(LICENSES)}")
    check_name(request.name)
    if request.name in taken(request.kind):
        raise RecipeError(f"'{request.name}' names another {request.kind} in a recipe already: choose another name")
    folder = into / request.distribution
    texts = render(request)
    try:
        folder.mkdir(parents=True)
        for path, text in texts.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError as error:
        raise RecipeError(f"{folder} exists already, and nothing is overwritten: remove it, or use --into") from error
    except OSError as error:
        raise MachineError(
            f"{folder} cannot be written: {error.strerror}. Use --into with a writable folder"
        ) from error
    return folder


def _words(request: Request, kind: Mapping[str, Any]) -> dict[str, str]:
    """What stands for each place of the templates."""
    words = {
        "name": request.name,
        "slug": request.name.replace("_", "-"),
        "class": "".join(word.capitalize() for word in request.name.split("_")),
        "distribution": request.distribution,
        "package": request.package,
        "kind": request.kind,
        "article": "an" if request.kind[0] in "aeiou" else "a",
        "api": str(HOOK_API),
        "camshaft": __version__,
        "year": str(datetime.now(UTC).year),
        "processes": "2",
        "group": "camshaft.plugins",
        "entry": f"{request.package}:Plugin",
        "tested": request.name,
        "imports": "import camshaft.testing\n",
        "parallel": "",
        **{need: _usual(need) for need in ("optimizer", "data_parallel", "pipeline_parallel", "kernels")},
        **{key: value for key, value in kind.items() if isinstance(value, str)},
    }
    words["reference"] = _text(kind["reference"]) if "reference" in kind else ""
    words["plugins"] = "\n".join(f"  {line}" for line in kind["plugins"].splitlines())
    return {key: _fill(value, words) for key, value in words.items()}


def _usual(need: str) -> str:
    """The plugin that a recipe takes for it.

    Raises:
        MachineError: none is installed.
    """
    found = usual(need)
    if found is None:
        raise MachineError(f"no installed plugin is the usual choice for '{need}': the recipe would lack it")
    return found[0]


def _fill(text: str, words: Mapping[str, str]) -> str:
    """``text`` with every place filled.

    Raises:
        KeyError: a place that nothing stands for.
    """
    return _PLACE.sub(lambda found: words[found[1]], text)


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")
