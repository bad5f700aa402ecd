"""Plugins that only the recipe's tests install, by replacing ``host.installed``."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from camshaft import Claim, Options, Plan, PlanContext, Plugin, Problem, RecipeError, hookimpl, host


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    ratio: float = 0.5
    """A share."""
    depth: int = 1


class FancyOptions(Options):
    rate: Annotated[float, Field(gt=0)] = 1e-3
    """How fast."""
    steps: int = 10
    pair: tuple[float, float] = (0.9, 0.95)
    mode: Literal["auto", "online", "offline"] = "auto"
    size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    inner: Inner = Inner()
    flag: bool = False
    required_text: str


class Fancy(Plugin):
    """Every kind of option."""

    Options = FancyOptions


class OtherLayout(Plugin):
    """Claims what ddp claims."""

    @hookimpl
    def plan(self, context: PlanContext) -> Plan:
        return Plan(claims=(Claim("gradient.reduce", "dp"),))


class Needy(Plugin):
    """Needs a fact that nobody provides, and finds a fault of its own."""

    @hookimpl
    def plan(self, context: PlanContext) -> Plan:
        fault = Problem("needs 3 things", key="plugins.needy", fix="bring them")
        return Plan(requires=("elementwise_magic",), problems=(fault,))


SEEN: list[str] = []


class Watcher(Plugin):
    """Notes the device that it is planned for."""

    @hookimpl
    def plan(self, context: PlanContext) -> Plan:
        SEEN.append(context.device)
        return Plan()


class Faulty(Plugin):
    """Has a bug."""

    @hookimpl
    def plan(self, context: PlanContext) -> Plan:
        return Plan(requires=("x",) * (1 // 0))


class Refusing(Plugin):
    """Refuses by raising instead of returning problems."""

    @hookimpl
    def plan(self, context: PlanContext) -> Plan:
        raise RecipeError(Problem("no", key="plugins.refusing"))


PLUGINS = {
    "fancy": "Fancy",
    "other_layout": "OtherLayout",
    "needy": "Needy",
    "watcher": "Watcher",
    "faulty": "Faulty",
    "refusing": "Refusing",
}


def install(monkeypatch: pytest.MonkeyPatch, *, broken: str = "") -> None:
    """Offer the plugins of this module beside the real ones; ``broken`` names one whose import would fail."""
    found: dict[str, Any] = dict(host.installed())
    for name, kind in PLUGINS.items():
        found[name] = EntryPoint(name, f"recipe_plugins:{kind}", host.GROUP)
    if broken:
        found[broken] = EntryPoint(broken, "module_that_must_not_be_imported:Plugin", host.GROUP)
    monkeypatch.setattr(host, "installed", lambda: found)
