"""The host: what loads, in which order, and what each mistake in a plugin is told."""

import sys
from importlib.metadata import EntryPoint

import pytest

import camshaft
from camshaft import bind, host
from camshaft.errors import MachineError, PluginError, RecipeError
from camshaft.host import Host, plugin_class


class Recorder(camshaft.Plugin):
    def __init__(self, calls, tag):
        super().__init__()
        self.calls, self.tag = calls, tag

    @camshaft.hookimpl
    def post_step(self, state):
        self.calls.append((self.tag, state))


def test_calls_follow_the_recipes_order_not_pluggys():
    calls = []
    linked = Host({tag: Recorder(calls, tag) for tag in ("b", "a", "c")})
    fire = bind.event(linked, "post_step")
    fire("state")
    assert calls == [("b", "state"), ("a", "state"), ("c", "state")]


def test_an_event_without_implementations_binds_to_none():
    assert bind.event(Host({}), "post_step") is None


def test_an_implementation_may_name_fewer_parameters_in_any_order():
    class Swapped(camshaft.Plugin):
        @camshaft.hookimpl
        def pre_forward(self, batch, state):
            return_to.append((batch, state))

    class OnlyBatch(camshaft.Plugin):
        @camshaft.hookimpl
        def pre_forward(self, batch):
            return_to.append(batch)

    class Nothing(camshaft.Plugin):
        @camshaft.hookimpl
        def pre_forward(self):
            return_to.append(None)

    return_to = []
    linked = Host({"swapped": Swapped(), "batch": OnlyBatch(), "nothing": Nothing()})
    bind.event(linked, "pre_forward")("S", "B")
    assert return_to == [("B", "S"), "B", None]


def test_middleware_puts_the_first_plugin_outermost():
    class Around(camshaft.Plugin):
        def __init__(self, tag):
            super().__init__()
            self.tag = tag

        @camshaft.hookimpl
        def around_forward(self, state, call):
            return lambda batch: f"{self.tag}({call(batch)})"

    linked = Host({"x": Around("x"), "y": Around("y")})
    assert bind.middleware(linked, "around_forward", None, lambda batch: batch)("b") == "x(y(b))"


def test_middleware_that_returns_nothing_is_named():
    class Broken(camshaft.Plugin):
        @camshaft.hookimpl
        def around_step(self, state, call):
            pass

    with pytest.raises(PluginError, match="plugin 'broken', hook 'around_step': must return a callable"):
        bind.middleware(Host({"broken": Broken()}), "around_step", None, lambda: None)


def test_a_misspelt_hook_is_refused_with_the_nearest_name():
    class Typo(camshaft.Plugin):
        @camshaft.hookimpl
        def post_backwards(self, state):
            pass

    with pytest.raises(PluginError, match=r"plugin 'typo'.*no hook called 'post_backwards'.*'post_backward'"):
        Host({"typo": Typo()})


def test_an_unmarked_method_with_a_hooks_name_is_refused():
    class Forgot(camshaft.Plugin):
        def post_step(self, state):
            pass

    with pytest.raises(PluginError, match="not marked @hookimpl"):
        Host({"forgot": Forgot()})


def test_defaults_keyword_only_and_unknown_parameters_are_refused():
    class Default(camshaft.Plugin):
        @camshaft.hookimpl
        def post_step(self, state=None):
            pass

    class Keyword(camshaft.Plugin):
        @camshaft.hookimpl
        def post_step(self, *, state):
            pass

    class Unknown(camshaft.Plugin):
        @camshaft.hookimpl
        def post_step(self, stat):
            pass

    cases = ((Default(), "has a default"), (Keyword(), "keyword-only"), (Unknown(), "no parameter 'stat'"))
    for plugin, words in cases:
        with pytest.raises(PluginError, match=words):
            Host({"p": plugin})


@pytest.mark.parametrize("option", ["wrapper", "tryfirst", "trylast", "optionalhook"])
def test_pluggys_own_options_are_refused_since_nothing_would_follow_them(option):
    class Wraps(camshaft.Plugin):
        @camshaft.hookimpl(**{option: True})
        def post_step(self, state):
            yield

    with pytest.raises(PluginError, match=f"plugin 'w', hook 'post_step': .*takes no options here, got {option}"):
        Host({"w": Wraps()})


def test_errors_carry_plugin_and_hook():
    class Raises(camshaft.Plugin):
        @camshaft.hookimpl
        def post_step(self):
            raise ValueError("no luck")

    with pytest.raises(PluginError, match="plugin 'raises', hook 'post_step': ValueError: no luck") as caught:
        bind.event(Host({"raises": Raises()}), "post_step")(None)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_slot_has_one_owner():
    class Clips(camshaft.Plugin):
        @camshaft.hookimpl
        def clip(self, state):
            return state

    linked = Host({"one": Clips(), "two": Clips()})
    with pytest.raises(RecipeError, match=r"'one' and 'two' both own the slot 'clip'"):
        linked.owner("clip")
    assert linked.owners()["clip"] == ["one", "two"]
    assert Host({"one": Clips()}).owner("clip")[0] == "one"
    assert Host({}).owner("clip") is None


def _offer(monkeypatch, *points):
    monkeypatch.setattr(host, "entry_points", lambda group: points)
    host.installed.cache_clear()


@pytest.fixture(autouse=True)
def _forget_entry_points():
    yield
    host.installed.cache_clear()


def test_only_the_plugin_that_is_asked_for_is_imported(monkeypatch, tmp_path):
    (tmp_path / "evil_plugin.py").write_text("raise SystemExit('imported')")
    (tmp_path / "good_plugin.py").write_text("import camshaft\nclass Plugin(camshaft.Plugin):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    _offer(
        monkeypatch,
        EntryPoint("evil", "evil_plugin:Plugin", host.GROUP),
        EntryPoint("good", "good_plugin:Plugin", host.GROUP),
    )
    assert plugin_class("good").__module__ == "good_plugin"
    assert "evil_plugin" not in sys.modules


def test_two_distributions_with_one_name_are_refused(monkeypatch):
    _offer(monkeypatch, EntryPoint("x", "a:Plugin", host.GROUP), EntryPoint("x", "b:Plugin", host.GROUP))
    with pytest.raises(MachineError, match="plugin 'x' is offered twice"):
        host.installed()


def test_a_missing_plugin_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"no plugin called 'dpp' is installed\. Did you mean 'ddp'"):
        plugin_class("dpp")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import camshaft\nclass Plugin(camshaft.Plugin):\n    hook_api = 99\n", "hook API 99"),
        ("Plugin = 3\n", "not a subclass of camshaft.Plugin"),
        ("import absent_module\n", "cannot be imported"),
    ],
)
def test_an_unusable_plugin_is_named(monkeypatch, tmp_path, source, words):
    module = f"unusable_{abs(hash(words))}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    _offer(monkeypatch, EntryPoint("u", f"{module}:Plugin", host.GROUP))
    with pytest.raises(PluginError, match=words):
        plugin_class("u")
