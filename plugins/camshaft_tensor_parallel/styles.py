"""What a plan says of modules: a style for each glob over their names. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from camshaft.errors import Problem, RecipeError

DIVIDED = {"column": 0, "shared": 0, "row": 1, "embedding": 0, "logits": 0}
"""Styles that divide parameters, and along which dimension of their matrix."""

KINDS = ("region", *DIVIDED, "loss", "inner", "outer")
"""Every style:

  region     what comes in is whole on every rank, and the gradient of it is summed: put it on what holds the products;
  column     rows of the matrix and its bias are divided: every rank makes a part of the outputs;
  shared     the same, and where there are fewer units than ranks, several ranks have the same one (key/value heads);
  row        columns of the matrix are divided, the ranks' products are summed, and then the bias is added;
  embedding  rows of the table are divided by vocabulary;
  logits     rows of the output projection are divided by vocabulary, and a region of its own;
  loss       sum of cross-entropies of logits that are divided by vocabulary, called with (logits, labels);
  inner      not divided, inside of a region: it works on this rank's part of the outputs of `column`;
  outer      not divided: it works on what is between regions, also where it is inside of one.

``column:64``, ``shared:64`` and ``row:64`` cut at multiples of 64 alone (a head), and ranks get equally many of them.
"""


@dataclass(frozen=True, slots=True)
class Style:
    """``kind`` is one of ``KINDS``; ``unit`` is how many neighbouring rows or columns stay together."""

    kind: str
    unit: int = 1

    @classmethod
    def of(cls, text: str, key: str) -> Style:
        """Read ``kind`` or ``kind:unit``.

        Raises:
            RecipeError: no such style, or no such unit of it; the problem is under ``key``.
        """
        kind, colon, unit = text.partition(":")
        if kind not in KINDS:
            raise RecipeError(Problem(f"there is no style '{kind}'", key=key, fix=f"use one of {', '.join(KINDS)}"))
        if not colon:
            return cls(kind)
        if kind not in ("column", "shared", "row") or not unit.isdecimal() or int(unit) < 1:
            fix = "give column, shared or row a whole number of features that stay together, such as column:64"
            raise RecipeError(Problem(f"'{text}' has no meaning", key=key, fix=fix))
        return cls(kind, int(unit))


class StylePlan:
    """Styles by module name: the model's own, then those of the recipe, which override them."""

    def __init__(self, own: Mapping[str, str], added: Mapping[str, str], key: str) -> None:
        """``key``: of the recipe's part, which problems name."""
        self._entries = [(glob, Style.of(text, f"{key}.{glob}")) for glob, text in (*own.items(), *added.items())]
        self.added, self.key = tuple(added), key

    def __len__(self) -> int:
        return len(self._entries)

    def style(self, module: str) -> Style | None:
        """Style of the module of that name: the last that matches."""
        return next((style for glob, style in reversed(self._entries) if fnmatchcase(module, glob)), None)

    def region(self, module: str) -> bool:
        """Whether the module of that name is in a region, or is one."""
        parts = module.split(".")
        names = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return any(style is not None and style.kind == "region" for style in map(self.style, names))

    def idle(self, modules: Iterable[str]) -> list[str]:
        """Globs of the recipe that match none of ``modules``."""
        names = list(modules)
        return [glob for glob in self.added if not any(fnmatchcase(name, glob) for name in names)]
