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
import os, sys, torch
from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.recipe import load
from camshaft.rundir import RunDirectory
from camshaft.testing.run import Quiet

resolved = load(sys.argv[1], world_size=1)
with session(resolved, Environment(0, 0, 1, 1, "none"), RunDirectory(resolved.recipe.run.dir)) as trainer:
    trainer.train(Quiet(), Quiet())
    print(torch.cuda.max_memory_allocated(), flush=True)
os._exit(0)  # torch's pool of compilers may take minutes to end
"""
AUTOCAST = {"precision": {"compute": "bf16"}}
NARROW = {"precision": {"compute": "bf16", "parameters": "bf16"}}
FP8 = {"precision": {"compute": "fp8"}}
FUSED, COMPILED = {"kernels": {"all": "auto"}}, {"compile": {}}
WIDE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 8, "head_dim": 128}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}
DEEP = {"num_hidden_layers": 24, "vocab_size": 2000}
QWEN = {"num_key_value_heads": 4, "qk_norm": True, "attention_bias": True}
MODEL = {"preset": "llama-125m", "vocab_size": 32000}
SHORT = {"sequence_length": 128}
LARGE = {"preset": "llama-1b", "max_position_embeddings": 4096}
LONG = {"sequence_length": 4096}


def recompute(mode, **options):
    return {"recompute": {"mode": mode, **options}}


CASES = {
    "fp32": ({}, {}, {}, 2),
    "autocast": (AUTOCAST, {}, {}, 4),
    "fp16": ({"precision": {"compute": "fp16"}}, {}, {}, 4),
    "bf16 parameters": (NARROW, {}, {}, 4),
    "packed documents": (AUTOCAST, {}, {"pack": True}, 4),
    "one microbatch": (AUTOCAST, {}, {}, 16),
    "grouped heads, qk_norm and biases": (AUTOCAST, QWEN, {}, 4),
    "untied": (NARROW, {"tie_word_embeddings": False}, {}, 4),
    "recompute, full": ({**AUTOCAST, **recompute("full")}, {}, {}, 8),
    "recompute, selective": ({**NARROW, **recompute("selective")}, {}, {}, 8),
    "recompute, a budget": ({**AUTOCAST, **recompute("selective", budget_gib=2.0)}, {}, {}, 8),
    "recompute, offload": ({**AUTOCAST, **recompute("offload")}, DEEP, {}, 8),
    "wider and short": (AUTOCAST, {**WIDE, **HEADS}, {}, 2),
    "fused operations": ({**AUTOCAST, **FUSED}, {}, {}, 4),
    "fused operations, bf16 parameters": ({**NARROW, **FUSED}, {}, {}, 4),
    "fused operations, documents": ({**AUTOCAST, **FUSED}, {}, {"pack": True}, 4),
    "a fused loss of torch's": ({**AUTOCAST, "kernels": {"linear_cross_entropy": "torch"}}, {}, {}, 4),
    "a loss of Triton's": ({**AUTOCAST, "kernels": {"cross_entropy": "triton"}}, {}, {}, 4),
    "compiled": ({**AUTOCAST, **COMPILED}, DEEP, {}, 8),
    "compiled, fp32": (COMPILED, DEEP, {}, 4),
    "compiled, qk_norm": ({**AUTOCAST, **COMPILED}, {**DEEP, **QWEN}, {}, 8),
    "compiled, recompute, fused": ({**AUTOCAST, **COMPILED, **FUSED, **recompute("selective")}, {}, {}, 8),
    "fp8": (FP8, DEEP, {}, 8),
    "fp8, compiled, fused": ({**FP8, **COMPILED, **FUSED}, DEEP, {}, 8),
    "mostly state, bf16 parameters": (NARROW, {**WIDE, **HEADS}, SHORT, 2),
    "mostly state, zero 1": ({**NARROW, "zero": {"stage": 1}}, {**WIDE, **HEADS}, SHORT, 2),
    "mostly state, zero 3": ({**AUTOCAST, "zero": {"stage": 3}}, {**WIDE, **HEADS}, SHORT, 2),
    "mostly state, lion": ({**NARROW, "adamw": None, "lion": {"lr": 1e-4}}, {**WIDE, **HEADS}, SHORT, 2),
    "1B at 4,096, plain": (AUTOCAST, LARGE, LONG, 4),
    "1B at 4,096, fast": ({**AUTOCAST, **FUSED, **COMPILED}, LARGE, LONG, 4),
    "1B at 4,096, saving": ({**AUTOCAST, **FUSED, **COMPILED, **recompute("selective")}, LARGE, LONG, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_within_a_tenth_of_the_gpus_count(make_recipe, tmp_path, case):
    plugins, model, data, micro = CASES[case]
    tree = make_recipe({}).tree
    sections = {
        "model": {**MODEL, **model},
        "data": {**tree["data"], "sequence_length": 1024, "document_mask": "documents" in case, **data},
        "batch": {"micro_batch_size": micro, "global_batch_size": 16},
        "training": {"max_steps": 2, "log_every": 1},
        "launch": {"device": "cuda"},
    }
    chosen = {"ddp": None, "adamw": {"lr": 1e-4}, "clip": {"max_norm": 1.0}, **plugins}
    resolved = make_recipe(chosen, 1, **sections)
    checked = check(resolved, 1, device="cuda").require()
    planned = Ranks(checked, Host.of(resolved.recipe.plugins)).fullest.peak
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(resolved.path)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert planned.bytes == pytest.approx(int(done.stdout.split()[-1]), rel=0.10), planned.moment
