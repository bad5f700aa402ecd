"""Recipes that compile, run on forked ranks, and what they compiled."""

from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.run import record_ranks

EXACT = {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15}
MODEL = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
SEQUENCE = 32
TRACED = {"backend": "aot_eager", "strict": True}
"""What tracing does to the numbers, without the minutes that kernels take; any later recompilation is an error."""


class Seen(Plugin):
    """Keeps the metrics of every record, and writes them where the parent process finds them."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    @hookimpl
    def log(self, state, record):
        with open(f"{self._path}.{state.world.rank}", "a") as file:
            file.write(repr(dict(record)) + "\n")


def records_of(path, rank=0):
    """The metrics that ``Seen`` has written."""
    with open(f"{path}.{rank}") as file:
        return [eval(line, {"inf": float("inf"), "nan": float("nan")}) for line in file]


def recipe(make_recipe, ranks=1, compiled=None, *, plugins=None, compute="fp64", model=None, **sections):
    """A recipe of four windows, the last one short; ``compiled``: the plugin's options, None: uncompiled."""
    data = ranks // max(1, sections.get("parallel", {}).get("tensor_parallel", 1))
    data //= sections.get("parallel", {}).get("pipeline_parallel", 1)
    given = {
        "ddp": None if data == 1 else {"bucket_size_mb": 0.005},
        "adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
        "clip": {"max_norm": 0.1},
        "precision": compute if isinstance(compute, dict) else {"compute": compute},
        **({} if compiled is None else {"compile": compiled}),
        **(plugins or {}),
    }
    batch = {"micro_batch_size": 2, "global_batch_size": 8}
    training = {"max_tokens": SEQUENCE * (3 * 8 + 5), "log_every": 1}
    return make_recipe(
        given,
        ranks,
        **{"model": MODEL | (model or {}), "batch": batch, "training": training, **sections},
    )


def run(resolved, ranks=1, observers=None, timeout_s=100):
    """Records of rank 0; those of all ranks are equal in every bit."""
    records = record_ranks(resolved, ranks, observers, timeout_s=timeout_s)
    for other in records[1:]:
        assert_bit_equal(records[0], other)
    return records[0]


__all__ = [
    "EXACT", "TRACED", "Plugin", "Seen", "assert_bit_equal", "assert_within", "compare", "hookimpl", "recipe",
    "records_of", "run",
]  # fmt: skip
