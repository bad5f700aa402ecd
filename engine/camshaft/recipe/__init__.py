"""From a YAML file to a frozen, validated recipe. Importing this imports no torch and no plugin."""

from camshaft.recipe.checks import Checked, batch_plan, check
from camshaft.recipe.nodes import Origin
from camshaft.recipe.resolved import Resolved, load

__all__ = ["Checked", "Origin", "Resolved", "batch_plan", "check", "load"]
