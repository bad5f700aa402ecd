"""Storage, reduction and step of ZeRO 0 to 3 by DeepSpeed."""

from __future__ import annotations

import camshaft


class Options(camshaft.Options):
    """Options of deepspeed."""


class Plugin(camshaft.Plugin):
    """Storage, reduction and step of ZeRO 0 to 3 by DeepSpeed."""

    Options = Options
