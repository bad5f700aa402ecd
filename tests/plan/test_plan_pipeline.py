"""What ``camshaft plan`` says of a rank of a pipeline, against the rank of a run."""

import pytest

from camshaft import comm
from camshaft.cli import estimate
from camshaft.cli import ranks as pages
from camshaft.host import Host
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import record_rank

ADAMW = {"adamw": {"lr": 1e-3}}
MODEL = {
    "hidden_size": 24, "intermediate_size": 38, "num_hidden_layers": 5, "num_attention_heads": 4, "head_dim": 6,
    "num_key_value_heads": 2,
}  # fmt: skip


class Watch(Plugin):
    """Notes what a rank holds, of which stages, and what it sends along ``pp`` in the last step."""

    @hookimpl
    def bind(self, state):
        self.bytes, self.step = {}, -1
        comm.Channel.observer = self.note
        self.state = state
        self.held = {
            name: (tuple(each.shape), state.world.stages[name], state.world.boxes.get(name))
            for name, each in state.model.named_parameters()
        }

    def note(self, call):
        if call.plugin != "pipeline" or call.op != "send":
            return
        if self.step != self.state.step:
            self.step, self.bytes = self.state.step, {}
        self.bytes[call.op] = self.bytes.get(call.op, 0) + call.bytes


def watched(rank, world_size, resolved):
    """(shape, stage and box of each parameter, bytes sent) of one rank."""
    watch = Watch()
    record_rank(rank, world_size, resolved, {"watch": watch})
    return watch.held, watch.bytes.get("send", 0)


def recipe(make_recipe, ranks, options, tied, extra=None, **parallel):
    changes = {
        "model": make_recipe(ADAMW).tree["model"] | MODEL | {"tie_word_embeddings": tied},
        "parallel": {"pipeline_parallel": 2, **parallel},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "training": {"max_steps": 2, "log_every": 100},
    }
    plugins = {**ADAMW, "ddp": None, "precision": {"compute": "fp32"}, "pipeline": options, **(extra or {})}
    return make_recipe(plugins, ranks, **changes)


def planned(resolved, ranks, rank):
    checked, host = check(resolved, ranks).require(), Host.of(resolved.recipe.plugins)
    sizes = estimate.sizes(checked, host, rank)
    sent = sum(entry.bytes for entry in estimate.estimate(checked, host, rank).sent if entry.axis == "pp")
    return {each.name: (each.shape, each.stage, each.box) for each in sizes.parameters}, sent


NARROW = {"precision": {"compute": "bf16", "parameters": "bf16", "gradients": "fp32"}}
SHARDS = {"tensor_parallel": {"sequence_parallel": True}}


@pytest.mark.parametrize(
    ("ranks", "options", "tied", "extra", "parallel"),
    [
        (2, {"schedule": "1f1b", "split": {"layers": [4, 1]}}, True, None, {}),
        (2, {"schedule": "interleaved_1f1b"}, True, NARROW, {}),
        (2, {"schedule": "zbv"}, True, None, {}),
        (4, {"schedule": "zb_h1"}, True, SHARDS, {"tensor_parallel": 2}),
        (4, {"schedule": "gpipe"}, False, {"tensor_parallel": {}}, {"tensor_parallel": 2}),
    ],
)
def test_a_run_holds_and_sends_what_the_plan_says(make_recipe, ranks, options, tied, extra, parallel):
    resolved = recipe(make_recipe, ranks, options, tied, extra, **parallel)
    for rank, (held, sent) in enumerate(run_ranks(ranks, watched, resolved, timeout_s=120)):
        expected, bytes_ = planned(resolved, ranks, rank)
        assert held == expected
        assert sent == pytest.approx(bytes_, abs=2)


def test_every_parameter_is_on_one_rank_of_the_pipeline(make_recipe):
    for schedule in ("1f1b", "interleaved_1f1b", "zbv"):
        resolved = recipe(make_recipe, 2, {"schedule": schedule}, False)
        found = [planned(resolved, 2, rank)[0] for rank in range(2)]
        checked = check(resolved, 2).require()
        names = [each.name for each in estimate.sizes(checked, Host({})).parameters]
        assert sorted([*found[0], *found[1]]) == sorted(names)


def test_a_table_of_a_tied_model_is_borrowed_where_the_last_stage_is_elsewhere(make_recipe):
    for schedule, borrowed in (("1f1b", ["lm_head.weight"]), ("zbv", [])):
        resolved = recipe(make_recipe, 2, {"schedule": schedule}, True)
        checked, host = check(resolved, 2).require(), Host.of(resolved.recipe.plugins)
        first, last = (estimate.sizes(checked, host, rank) for rank in range(2))
        assert [each.name for each in first.borrowed] == []
        assert [each.name for each in last.borrowed] == borrowed
        (table,) = [each for each in first.parameters if each.name == "model.embed_tokens.weight"]
        assert table.tied == (() if borrowed else ("lm_head.weight",))


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("gpipe", "2 stages on 2 ranks, 4 microbatches; bubble 25.0% of"),
        ("1f1b", "2 stages on 2 ranks, 4 microbatches; bubble 25.0% of"),
        ("interleaved_1f1b", "4 stages on 2 ranks, 4 microbatches; bubble 12.5% of"),
        ("zbv", "4 stages on 2 ranks, 4 microbatches; bubble 4.2% of"),
    ],
)
def test_the_bubble_is_told_and_each_ranks_program(make_recipe, schedule, words):
    """(p - 1) / m of the ideal time, and 1 / v of that: Narayanan et al., arXiv:2104.04473, section 2.2."""
    resolved = recipe(make_recipe, 2, {"schedule": schedule}, True)
    text = pages.show(pages.Ranks(check(resolved, 2).require(), Host.of(resolved.recipe.plugins)), None)
    assert f"schedule {schedule}: {words}" in text


def test_a_model_of_a_plugins_own_is_not_counted_by_stages(make_recipe):
    class Builds(Plugin):
        @hookimpl
        def build_model(self, world, config):
            raise AssertionError

    resolved = recipe(make_recipe, 2, {}, True)
    host = Host.of(resolved.recipe.plugins, {"builds": Builds()})
    text = pages.show(pages.Ranks(check(resolved, 2).require(), host), None)
    assert "what is sent along pp is not counted: a plugin builds a model of its own" in text
    assert "bubble 25.0%" in text
