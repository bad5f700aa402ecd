"""Recipes with a pipeline, their reference in one process, and the comparison of both."""

from camshaft.data import prepare
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.reference import plain_run
from camshaft.testing.run import record_ranks
from references import ADAMW, EXACT, torch_adamw

MAX_NORM = 0.1
MODEL = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


def recipe(make_recipe, world_size, pipeline=None, *, model=None, optimizer=ADAMW, ranks=None, **sections):
    """``pipeline``: the plugin's options (None: one process); ``ranks``: pipeline ranks, all of them if None."""
    plugins = {**optimizer, "clip": {"max_norm": MAX_NORM}, "precision": {"compute": "fp64"}}
    ranks = ranks or world_size
    if pipeline is not None:
        plugins["pipeline"] = pipeline
        sections.setdefault("parallel", {"pipeline_parallel": ranks})
    data = world_size // ranks if pipeline is not None else world_size
    if data == 1:
        plugins["ddp"] = None
    chosen = {"training": {"max_steps": 3, "log_every": 1}, "batch": {"micro_batch_size": 1, "global_batch_size": 8}}
    extra = sections.pop("plugins", {})
    return make_recipe({**plugins, **extra}, world_size, model=MODEL | (model or {}), **(chosen | sections))


def reference(resolved, build=torch_adamw, prepare_model=lambda model: None, compute="fp64"):
    records = plain_run(resolved, prepare(resolved), build, compute=compute, max_norm=MAX_NORM, prepare=prepare_model)
    assert all(record.norm > MAX_NORM for record in records), "clipping must be active in every step"
    return records


def assert_equal(resolved, world_size, wanted, observers=None, bounds=EXACT):
    """Train on ranks: rank 0 has the reference's numbers, and all ranks have one another's in every bit."""
    ranks = record_ranks(resolved, world_size, observers)
    assert_within(compare(ranks[0], wanted), bounds)
    for other in ranks[1:]:
        assert_bit_equal(ranks[0], other)
    return ranks


__all__ = ["Plugin", "assert_bit_equal", "assert_within", "compare", "hookimpl", "record_ranks"]
