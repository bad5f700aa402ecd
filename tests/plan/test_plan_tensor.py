"""What ``camshaft plan`` says of a rank with tensor parallelism, against the rank of a run."""

import dataclasses

import pytest

from camshaft import comm
from camshaft.cli import estimate
from camshaft.host import Host
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import record_rank

ADAMW = {"adamw": {"lr": 1e-3}}
MODEL = {
    "hidden_size": 24, "intermediate_size": 38, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6,
    "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "tied": {},
    "one key head, biases, norms of heads, untied": {
        "num_key_value_heads": 1, "attention_bias": True, "qk_norm": True, "tie_word_embeddings": False,
    },
}  # fmt: skip


class Watch(Plugin):
    """Notes what a rank holds, and what it sends along ``tp`` in the last step."""

    @hookimpl
    def bind(self, state):
        self.bytes = {}
        comm.Channel.observer = self.note
        boxes = state.world.boxes
        self.held = {name: (tuple(p.shape), boxes.get(name)) for name, p in state.model.named_parameters()}

    def note(self, call):
        if call.plugin == "tensor_parallel":
            self.bytes[call.op] = self.bytes.get(call.op, 0) + call.bytes

    @hookimpl
    def pre_forward(self, state):
        if state.microbatch == 0 and state.stage == min(state.world.stages.values(), default=0):
            self.bytes.clear()


def watched(rank, world_size, resolved):
    """(shape and box of each parameter, bytes by operation) of one rank."""
    watch = Watch()
    record_rank(rank, world_size, resolved, {"watch": watch})
    return watch.held, watch.bytes


def recipe(make_recipe, ranks, options, model, precision=None, **parallel):
    changes = {
        "model": make_recipe(ADAMW).tree["model"] | MODEL | MODELS[model],
        "parallel": {"tensor_parallel": 2, **parallel},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "training": {"max_steps": 2, "log_every": 100},
    }
    data = {"ddp": {}} if ranks > 2 else {"ddp": None}
    plugins = {**data, **ADAMW, "tensor_parallel": options, "precision": precision or {"compute": "fp32"}}
    return make_recipe(plugins, ranks, **changes)


def planned(resolved, ranks, rank):
    checked, host = check(resolved, ranks).require(), Host.of(resolved.recipe.plugins)
    sizes, sent = estimate.sizes(checked, host, rank), {}
    for entry in estimate.estimate(checked, host, rank).sent:
        if entry.axis == "tp":
            sent[entry.op] = sent.get(entry.op, 0) + entry.bytes
    return {each.name: (each.shape, each.box) for each in sizes.parameters}, sent


BF16, SEQUENCE = {"compute": "bf16"}, {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("ranks", "options", "model", "precision"),
    [
        (2, {}, "tied", None),
        (2, SEQUENCE, "tied", BF16),
        (2, {**SEQUENCE, "async": True}, "tied", None),
        (2, SEQUENCE, "one key head, biases, norms of heads, untied", None),
        (4, {}, "one key head, biases, norms of heads, untied", BF16),
    ],
)
def test_a_run_holds_and_sends_what_the_plan_says(make_recipe, ranks, options, model, precision):
    resolved = recipe(make_recipe, ranks, options, model, precision)
    for rank, (held, sent) in enumerate(run_ranks(ranks, watched, resolved, timeout_s=120)):
        expected, bytes_ = planned(resolved, ranks, rank)
        assert held == expected
        if options.get("async"):  # the same bytes, in messages that are waited for one by one
            assert sent["all_to_all"] > sent["all_gather"] > 0
            assert sum(sent.values()) == pytest.approx(sum(bytes_.values()), abs=4)
        else:
            assert sent == pytest.approx(bytes_, abs=2)


@pytest.mark.parametrize("sequence", [False, True])
def test_a_layer_costs_four_sums_a_microbatch_or_the_same_bytes(make_recipe, sequence):
    """Shoeybi et al., arXiv:1909.08053, section 3; Korthikanti et al., arXiv:2205.05198, section 4.2.2."""
    found = []
    for layers in (2, 3):
        resolved = recipe(make_recipe, 2, {"sequence_parallel": sequence}, "tied")
        checked, host = check(resolved, 2).require(), Host.of(resolved.recipe.plugins)
        checked.config = dataclasses.replace(checked.config, num_hidden_layers=layers)
        own = [entry for entry in estimate.estimate(checked, host).sent if entry.axis == "tp"]
        # The last sum is that of the norms' gradients, and no traffic of activations.
        found.append(sum(entry.bytes for entry in (own[:-1] if sequence else own)))
    tokens, share, microbatches = 2 * 32, 1 / 2, 4
    assert found[1] - found[0] == microbatches * 4 * 2 * share * tokens * 24 * 4
