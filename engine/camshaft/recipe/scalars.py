"""Plain scalars as the core schema of YAML 1.2 reads them (https://yaml.org/spec/1.2.2/#1032-tag-resolution).

PyYAML implements YAML 1.1, in which ``1e-4`` is text, ``010`` is 8, ``no`` is false and ``12:30`` is 750.
"""

from __future__ import annotations

import math
import re

from camshaft.recipe.nodes import Scalar

NULL = frozenset({"", "~", "null", "Null", "NULL"})
TRUE = frozenset({"true", "True", "TRUE"})
FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LONGEST_NUMBER = 100


def resolve(text: str) -> Scalar:
    """The value of an unquoted scalar.

    Raises:
        ValueError: not a finite number, or a number of more than 100 characters.
    """
    if text in NULL:
        return None
    if text in TRUE or text in FALSE:
        return text in TRUE
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    return _number(text)


def _number(text: str) -> Scalar:
    is_int, is_float = _INT.fullmatch(text), _FLOAT.fullmatch(text)
    if not (is_int or is_float or _OCTAL.fullmatch(text) or _HEX.fullmatch(text)):
        return text
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} characters")
    if is_int:
        return int(text)
    if not is_float:
        return int(text, 0)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def is_number(text: str) -> bool:
    """Whether ``text`` would be a number without its quotes."""
    try:
        return isinstance(resolve(text), int | float) and text not in TRUE | FALSE
    except ValueError:
        return False


def unprintable(text: str) -> bool:
    """Whether ``text`` holds NUL, half a surrogate pair or another control character than tab and newline."""
    return any((ord(sign) < 32 and sign not in "\t\n\r") or 0xD800 <= ord(sign) <= 0xDFFF for sign in text)
