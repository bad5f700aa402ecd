"""``${env:NAME}`` and ``${env:NAME:-default}`` in values. Nothing else is interpolated, and nothing twice."""

from __future__ import annotations

import re
from collections.abc import Mapping

from camshaft.recipe import scalars, secrets
from camshaft.recipe.nodes import Document, Node, show_key, walk

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_ENV = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)


class _Refused(Exception):
    """(message, fix) of one reference that cannot be used."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.message, self.fix = message, fix


def interpolate(document: Document, environ: Mapping[str, str]) -> None:
    """Replace the references in every scalar of the tree; report those that cannot be."""
    for key, node in walk(document.root):
        if isinstance(node.value, str) and "${" in node.value and not node.bad:
            try:
                _replace(node, environ)
            except _Refused as error:
                document.refuse(node, key, error.message, error.fix)


def _replace(node: Node, environ: Mapping[str, str]) -> None:
    assert isinstance(node.value, str)
    if "${" in _REFERENCE.sub("", node.value):
        raise _Refused("'${' without a matching '}'", "write ${env:NAME} or ${env:NAME:-default}")
    text = _REFERENCE.sub(lambda match: _look_up(match.group(1), environ), node.value)
    if why := secrets.has_secret_shape(text):
        raise _Refused(f"the environment puts {why} here: a recipe holds no secrets", secrets.FIX)
    try:
        node.value = scalars.resolve(text) if node.plain else text
    except ValueError as error:
        raise _Refused(str(error), "give a finite number of usual length") from None


def _look_up(reference: str, environ: Mapping[str, str]) -> str:
    found = _ENV.fullmatch(reference)
    if found is None:
        raise _Refused(
            f"'${{{show_key(reference)}}}' is not interpolated: only ${{env:NAME}} is",
            "write ${env:NAME} or ${env:NAME:-default}",
        )
    name, default = found.group(1), found.group(2)
    if secrets.is_secret_name(name):
        message = f"the environment variable '{name}' is named like a secret, and a recipe holds none"
        raise _Refused(message, secrets.FIX)
    value = environ.get(name, default)
    if value is None:
        raise _Refused(f"the environment variable '{name}' is not set", f"set it, or write ${{env:{name}:-default}}")
    if "${" in value or scalars.unprintable(value):
        raise _Refused(f"the value of '{name}' holds '${{' or control characters", "give it a plain text")
    return value
