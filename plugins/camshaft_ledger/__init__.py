"""The ledger of communication."""

from __future__ import annotations

import camshaft


class Options(camshaft.Options):
    """Options of ledger."""


class Plugin(camshaft.Plugin):
    """The ledger of communication."""

    Options = Options
