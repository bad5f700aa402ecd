"""Faster implementations of single operations, chosen for this machine."""

from __future__ import annotations

import camshaft


class Options(camshaft.Options):
    """Which implementation each operation has."""


class Plugin(camshaft.Plugin):
    """Faster implementations of single operations, chosen for this machine."""

    Options = Options
