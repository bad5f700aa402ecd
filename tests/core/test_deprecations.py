"""The hook API's number is shown, and a hook goes away with a minor release of warning."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import camshaft
from camshaft import deprecations, hookimpl
from camshaft.deprecations import Deprecation, HookDeprecated
from camshaft.errors import PluginError
from camshaft.hookspecs import FAMILIES
from camshaft.host import Host

ROOT = Path(__file__).resolve().parents[2]
OLD = Deprecation(since="0.2", removed="0.3", instead="post_reduce, which comes after clipping's owner is known")
SPECS = {name for family in FAMILIES for name, _ in inspect.getmembers(family, inspect.isfunction)}


class Plugin(camshaft.Plugin):
    """Implements what the tests deprecate."""

    @hookimpl
    def post_step(self) -> None: ...


class Gone(camshaft.Plugin):
    """Implements what does not exist any more."""

    @hookimpl
    def post_window(self) -> None: ...


def test_a_deprecated_hook_works_and_warns_with_plugin_and_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deprecations, "DEPRECATED", {"post_step": OLD})
    with pytest.warns(HookDeprecated, match=r"plugin 'mine' implements the hook 'post_step'.*0\.3 removes.*since 0\.2"):
        host = Host({"mine": Plugin()})
    assert [name for name, _ in host.implementations("post_step")] == ["mine"]


def test_other_hooks_do_not_warn(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(deprecations, "DEPRECATED", {"post_backward": OLD})
    Host({"mine": Plugin()})
    assert not recwarn.list


def test_a_removed_hook_says_what_took_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match="there is no hook called 'post_window'") as without:
        Host({"mine": Gone()})
    assert "removed in" not in str(without.value)
    monkeypatch.setattr(deprecations, "REMOVED", {"post_window": OLD})
    with pytest.raises(PluginError, match=r"it was removed in Camshaft 0\.3: use post_reduce"):
        Host({"mine": Gone()})


def test_entries_name_hooks_and_last_one_minor_release() -> None:
    now = minor(camshaft.__version__)
    assert deprecations.DEPRECATED.keys() <= SPECS and SPECS.isdisjoint(deprecations.REMOVED)
    for entry in (*deprecations.DEPRECATED.values(), *deprecations.REMOVED.values()):
        assert minor(entry.removed) > minor(entry.since)
    assert all(minor(entry.removed) > now for entry in deprecations.DEPRECATED.values()), "overdue"
    assert all(minor(entry.removed) <= now for entry in deprecations.REMOVED.values()), "too early"


def minor(version: str) -> tuple[int, int]:
    major, number = version.split(".")[:2]
    return int(major), int(number)


def test_plan_shows_the_number(capsys: pytest.CaptureFixture[str]) -> None:
    from camshaft.cli import run

    assert run(["plan", str(ROOT / "recipes" / "one_process.yaml")]) == 0
    assert re.search(rf"^hooks +API {camshaft.HOOK_API}$", capsys.readouterr().out, re.MULTILINE)


def test_a_plugin_for_another_number_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from camshaft import host

    class Older(camshaft.Plugin):
        hook_api = camshaft.HOOK_API + 1

    class Point:
        value = "older:Older"

        def load(self) -> type[camshaft.Plugin]:
            return Older

    monkeypatch.setattr(host, "installed", lambda: {"older": Point()})
    with pytest.raises(PluginError, match=r"written for hook API \d+, and this Camshaft has \d+"):
        host.plugin_class("older")
