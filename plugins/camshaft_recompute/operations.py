"""Which operations the installed torch has, by the table that its wheel carries for its code generator. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from camshaft.errors import Problem

TABLE = "packaged/ATen/native/native_functions.yaml"
"""In torch's package ``torchgen``."""
SPACE = "aten."


@cache
def native() -> frozenset[str]:
    """Names such as ``aten.mm``; empty where this torch has no such table, and so nothing is known before it runs."""
    spec = find_spec("torchgen")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        try:
            text = (Path(folder) / TABLE).read_text(encoding="utf-8")
        except OSError:
            continue
        made = (each for line in re.findall(r"^\s+autogen:(.*)$", text, re.MULTILINE) for each in line.split(","))
        names = [*re.findall(r"^- func: (\w+)", text, re.MULTILINE), *(each.strip().split(".")[0] for each in made)]
        return frozenset(SPACE + name for name in names if name)
    return frozenset()


def faults(words: Iterable[str], key: str) -> list[Problem]:
    """One for each of ``words`` that is in torch's own name space, ``*`` as in file names, and fits nothing there.

    Libraries of others may be imported later: of their operations nothing is said.
    """
    known = native()
    return [
        strange(word, key, _near(word, known))
        for word in words
        if known and word.startswith(SPACE) and not any(fnmatchcase(name, word) for name in known)
    ]


def _near(word: str, known: frozenset[str]) -> list[str]:
    plain = ".".join(word.split(".")[:2])
    return [] if "*" in word else get_close_matches(plain, sorted(known), n=1, cutoff=0.75)


def strange(word: str, key: str, near: Iterable[str] = ()) -> Problem:
    """The fault of a name that torch does not have."""
    meant = next(iter(near), None)
    fix = "take a kind, or the name of an operation as torch.ops.aten has it, such as aten.mm"
    return Problem(
        f"torch has no operation '{word}'", key=key, fix=fix if meant is None else f"use {meant}, or {fix[5:]}"
    )
