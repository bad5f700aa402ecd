"""Activations that are made again in backward, or kept elsewhere, instead of being held."""

from __future__ import annotations

import camshaft


class Options(camshaft.Options):
    """What is recomputed."""


class Plugin(camshaft.Plugin):
    """Activations that are made again in backward, or kept elsewhere, instead of being held."""

    Options = Options
