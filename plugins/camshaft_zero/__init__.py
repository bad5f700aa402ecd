"""ZeRO 1, 2, 3 and hybrid sharding."""

from __future__ import annotations

import camshaft


class Options(camshaft.Options):
    """Options of zero."""


class Plugin(camshaft.Plugin):
    """ZeRO 1, 2, 3 and hybrid sharding."""

    Options = Options
