"""Tools for tests of plugins: the conformance kit, forked ranks, and a recipe run beside one plain process.

Importing this imports neither torch nor pytest.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camshaft.testing.conformance import Conformance as Conformance

if "pytest" in sys.modules:  # so that a failed test of the kit shows values
    sys.modules["pytest"].register_assert_rewrite("camshaft.testing.conformance")


def __getattr__(name: str) -> Any:
    if name == "Conformance":
        from camshaft.testing.conformance import Conformance

        return Conformance
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
