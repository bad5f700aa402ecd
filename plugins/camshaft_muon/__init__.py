"""Muon."""

from __future__ import annotations

import camshaft


class Options(camshaft.Options):
    """Options of muon."""


class Plugin(camshaft.Plugin):
    """Muon."""

    Options = Options
