"""Lion."""

from __future__ import annotations

import camshaft


class Options(camshaft.Options):
    """Options of lion."""


class Plugin(camshaft.Plugin):
    """Lion."""

    Options = Options
