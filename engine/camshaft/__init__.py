"""Camshaft: a training engine for large language models. A small core; every strategy is a plugin.

Importing this package imports no torch.
"""

from camshaft.claims import Claim, Plan, PlanContext, Widths
from camshaft.errors import CamshaftError, Problem, RecipeError
from camshaft.plugin import HOOK_API, Options, Plugin, hookimpl

__version__ = "0.1.0"

__all__ = [
    "HOOK_API",
    "CamshaftError",
    "Claim",
    "Options",
    "Plan",
    "PlanContext",
    "Plugin",
    "Problem",
    "RecipeError",
    "Widths",
    "__version__",
    "hookimpl",
]
