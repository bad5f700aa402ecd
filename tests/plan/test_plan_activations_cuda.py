"""The peak that ``camshaft plan`` states, against a GPU's own count, on models so large that rounding matters little.

Each recipe runs in a process of its own, so that none finds memory that another has left.
"""

import subprocess
import sys

import pytest
import torch

from camshaft.cli.ranks import Ranks
from camshaft.host import Host
from camshaft.recipe import check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's own count of its memory")

RUN = """
import sys, torch
from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.recipe import load
from camshaft.rundir import RunDirectory
from camshaft.testing.run import Quiet

resolved = load(sys.argv[1], world_size=1)
with session(resolved, Environment(0, 0, 1, 1, "none"), RunDirectory(resolved.recipe.run.dir)) as trainer:
    run, steps = trainer.stepper.run, []
    def one(*arguments):
        if len(steps) == 1:
            torch.cuda.reset_peak_memory_stats()
        steps.append(run(*arguments))
    trainer.stepper.run = one
    trainer.train(Quiet(), Quiet())
    print(torch.cuda.max_memory_allocated())
"""
AUTOCAST = {"precision": {"compute": "bf16"}}
NARROW = {"precision": {"compute": "bf16", "parameters": "bf16"}}
WIDE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 8, "head_dim": 128}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}
MODEL = {"preset": "llama-125m", "vocab_size": 32000}
CASES = {
    "fp32": ({}, {}, {}, 2),
    "autocast": (AUTOCAST, {}, {}, 4),
    "bf16 parameters": (NARROW, {}, {}, 4),
    "packed documents": (AUTOCAST, {}, {"pack": True}, 4),
    "one microbatch": (AUTOCAST, {}, {}, 16),
    "grouped heads, qk_norm and biases": (
        AUTOCAST,
        {"num_key_value_heads": 4, "qk_norm": True, "attention_bias": True},
        {},
        4,
    ),
    "untied": (NARROW, {"tie_word_embeddings": False}, {}, 4),
    "recompute, full": ({**AUTOCAST, "recompute": {"mode": "full"}}, {}, {}, 8),
    "recompute, selective": ({**NARROW, "recompute": {"mode": "selective"}}, {}, {}, 8),
    "wider and short": (AUTOCAST, {**WIDE, **HEADS}, {}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_within_a_tenth_of_the_gpus_count(make_recipe, tmp_path, case):
    plugins, model, data, micro = CASES[case]
    tree = make_recipe({}).tree
    sections = {
        "model": {**MODEL, **model},
        "data": {**tree["data"], "sequence_length": 1024, "document_mask": case == "packed documents", **data},
        "batch": {"micro_batch_size": micro, "global_batch_size": 16},
        "training": {"max_steps": 2, "log_every": 1},
        "launch": {"device": "cuda"},
    }
    resolved = make_recipe({"ddp": None, **plugins, "adamw": {"lr": 1e-4}, "clip": {"max_norm": 1.0}}, 1, **sections)
    checked = check(resolved, 1, device="cuda").require()
    planned = Ranks(checked, Host.of(resolved.recipe.plugins)).fullest.peak
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(resolved.path)],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert planned.bytes == pytest.approx(int(done.stdout.split()[-1]), rel=0.10), planned.moment
