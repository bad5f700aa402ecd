"""Published bugs of other engines, re-created as small broken plugins: which recipe shows each, and who is to blame."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any

from camshaft import host

TP = {"tensor_parallel": 2}
PP = {"pipeline_parallel": 2}
INNER = {"plan": {"model.layers.*.mlp.drop": "inner"}}
EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Bug:
    """``plugin`` is the recipe's key of the broken plugin, ``made_by`` the class; ``plugins`` are those beside it."""

    plugin: str
    made_by: str
    report: str
    ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    plugins: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, int] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    told_by: str = "numbers"
    """``numbers``: verify compares them; ``run``: verify's run ends with an error that names it; ``resume``: the
    conformance kit's test of a continued run."""


GITHUB = "https://github.com"
ZERO1 = {"stage": 1, "bucket_size_mb": 0.003}
SHARDED = {"data_parallel_shard": 2, "data_parallel_replicate": 2}

BUGS = (
    Bug("mean_of_means", "zoo_losses:MeanOfMeans", f"{GITHUB}/huggingface/transformers/issues/34191"),
    Bug("last_microbatch", "zoo_losses:LastMicrobatch", f"{GITHUB}/deepspeedai/DeepSpeed/issues/966"),
    Bug("mean_of_ranks", "zoo_losses:MeanOfRanks", f"{GITHUB}/huggingface/transformers/issues/39648", ranks=2),
    Bug("twice_averaged", "zoo_losses:TwiceAveraged", f"{GITHUB}/pytorch/pytorch/issues/160285", ranks=2),
    Bug(
        "one_axis",
        "zoo_losses:OneAxis",
        f"{GITHUB}/huggingface/picotron/blob/main/train.py",
        ranks=4,
        parallel=SHARDED,
    ),
    Bug(
        "waits_for_all",
        "zoo_losses:WaitsForAll",
        f"{GITHUB}/deepspeedai/DeepSpeed/issues/777",
        ranks=2,
        plugins={"with_unused": {}},
        told_by="run",
    ),
    Bug(
        "positions_go_on",
        "zoo_losses:PositionsGoOn",
        f"{GITHUB}/NVIDIA/Megatron-LM/issues/5243",
        data={"pack": True, "document_mask": True},
    ),
    Bug(
        "own_seed",
        "zoo_losses:OwnSeed",
        f"{GITHUB}/InternLM/InternLM/pull/405",
        ranks=2,
        plugins={"with_dropout": {}, "tensor_parallel": INNER},
        model=EVEN,
        parallel=TP,
    ),
    Bug(
        "replicated_twice",
        "zoo_norms:ReplicatedTwice",
        f"{GITHUB}/NVIDIA/Megatron-LM/pull/5916",
        ranks=2,
        options={"max_norm": 0.1},
        plugins={"tensor_parallel": {}, "clip": None},
        model=EVEN,
        parallel=TP,
    ),
    Bug(
        "tied_twice",
        "zoo_norms:TiedTwice",
        f"{GITHUB}/NVIDIA/Megatron-LM/issues/7227",
        options={"max_norm": 0.1},
        plugins={"clip": None},
    ),
    Bug(
        "padding_in_norm",
        "zoo_norms:PaddingInNorm",
        f"{GITHUB}/NVIDIA/Megatron-LM/pull/6778",
        ranks=2,
        options={"stage": 2},
    ),
    Bug("clips_scaled", "zoo_norms:ClipsScaled", f"{GITHUB}/Lightning-AI/pytorch-lightning/issues/9599"),
    Bug(
        "norms_not_summed",
        "zoo_divided:NormsNotSummed",
        f"{GITHUB}/NVIDIA/Megatron-LM/issues/1446",
        ranks=2,
        options={"sequence_parallel": True},
        model=EVEN,
        parallel=TP,
    ),
    Bug(
        "same_mask",
        "zoo_divided:SameMask",
        f"{GITHUB}/tenstorrent/tt-metal/issues/55947",
        ranks=2,
        options=INNER,
        plugins={"with_dropout": {}},
        model=EVEN,
        parallel=TP,
    ),
    Bug(
        "moving_average",
        "zoo_divided:MovingAverage",
        f"{GITHUB}/pytorch/torchtitan/issues/1733",
        ranks=2,
        parallel=PP,
    ),
    Bug("drifting_ties", "zoo_divided:DriftingTies", f"{GITHUB}/uw-syfi/piper/issues/13", ranks=2, parallel=PP),
    Bug(
        "early_gather",
        "zoo_divided:EarlyGather",
        f"{GITHUB}/deepspeedai/DeepSpeed/issues/8061",
        ranks=2,
        options=ZERO1,
    ),
    Bug(
        "decays_norms",
        "zoo_small:DecaysNorms",
        f"{GITHUB}/verl-project/verl/issues/5070",
        options={"lr": 3e-3, "weight_decay": 0.1},
        plugins={"adamw": None},
    ),
    Bug(
        "forgets_random",
        "zoo_small:ForgetsRandom",
        f"{GITHUB}/allenai/OLMo-core/issues/828",
        options={"mode": "full"},
        plugins={"with_dropout": {}},
    ),
    Bug("fused_flag", "zoo_small:FusedFlag", f"{GITHUB}/huggingface/picotron/blob/main/train.py", told_by="run"),
    Bug(
        "repeats_samples",
        "zoo_small:RepeatsSamples",
        f"{GITHUB}/huggingface/accelerate/issues/2016",
        told_by="resume",
    ),
)

HELPERS = {"with_dropout": "zoo_small:WithDropout", "with_unused": "zoo_small:WithUnused"}
GENUINE = {
    "norms_not_summed": "tensor_parallel",
    "same_mask": "tensor_parallel",
    "moving_average": "pipeline",
    "drifting_ties": "pipeline",
    "early_gather": "zero",
    "padding_in_norm": "zero",
    "replicated_twice": "clip",
    "tied_twice": "clip",
    "decays_norms": "adamw",
    "forgets_random": "recompute",
    "mean_of_ranks": "ddp",
    "twice_averaged": "ddp",
    "one_axis": "ddp",
    "waits_for_all": "ddp",
}
"""The plugin of ours that does right what the broken one does wrong; in its place nothing may be found."""


def install(monkeypatch) -> None:
    """Make every animal of the zoo an installed plugin."""
    made = {bug.plugin: bug.made_by for bug in BUGS} | HELPERS
    points = {name: EntryPoint(name, f"{path}", host.GROUP) for name, path in made.items()}
    found = {**host.installed(), **points}
    monkeypatch.setattr(host, "installed", lambda: found)


def recipe(make_recipe, bug: Bug, *, right: bool = False):
    """The recipe that shows ``bug``; ``right``: with our own plugin in its place, or without it."""
    adamw = {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
    plugins: dict[str, Any] = {"ddp": None, "adamw": adamw, "clip": {"max_norm": 0.1}, "precision": {"compute": "fp64"}}
    plugins |= bug.plugins
    if not right:
        plugins[bug.plugin] = bug.options
    elif bug.plugin in GENUINE:
        plugins[GENUINE[bug.plugin]] = bug.options
    base = make_recipe({})
    sections: dict[str, Any] = {"model": base.tree["model"] | bug.model, "training": {"max_steps": 4, "log_every": 1}}
    if bug.parallel:
        sections["parallel"] = bug.parallel
    if bug.data:
        sections["data"] = base.tree["data"] | bug.data
    return make_recipe(plugins, bug.ranks, accumulation=2, **sections)
