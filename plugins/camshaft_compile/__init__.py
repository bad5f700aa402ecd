"""Blocks compiled with torch.compile, one graph for all layers that are alike."""

from __future__ import annotations

import camshaft


class Options(camshaft.Options):
    """What is compiled."""


class Plugin(camshaft.Plugin):
    """Blocks compiled with torch.compile, one graph for all layers that are alike."""

    Options = Options
