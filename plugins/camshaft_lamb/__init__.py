"""LAMB."""

from __future__ import annotations

import camshaft


class Options(camshaft.Options):
    """Options of lamb."""


class Plugin(camshaft.Plugin):
    """LAMB."""

    Options = Options
