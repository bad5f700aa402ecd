"""Which rectangle of a parameter a rank computes with. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """Which rectangle of a parameter a rank computes with, where axes of the model (tensor parallel) divide it.

    ``shape`` is the whole parameter's; the rectangle begins at index ``offset`` of it and has the shape of the rank's
    own parameter. ``copies``: ranks along those axes that have the same rectangle; their values are bit-equal.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    copies: int = 1
