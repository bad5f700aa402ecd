"""The configuration that DeepSpeed is given, as data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from camshaft.state import BatchPlan, Policy

if TYPE_CHECKING:
    from camshaft_deepspeed.options import Options

Config = dict[str, Any]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ZERO_KEYS = {
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "persistence_threshold": "stage3_param_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
}
"""Names in DeepSpeed, where they differ."""
PLAIN = ("overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_bucket_size")


def disk_folder(options: Options, run: Path) -> str | None:
    """A run's own folder for what it keeps on a disk: DeepSpeed empties it at the start, whoever's it was."""
    if options.nvme_path is None:
        return None
    return str(Path(options.nvme_path) / f"run-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]}")


def deepspeed_config(options: Options, policy: Policy, batch: BatchPlan, *, gpu: bool, disk: str | None) -> Config:
    """What ``deepspeed.initialize`` gets.

    Gradients are summed, never averaged, because the engine has divided the loss already; stage 3 can only average,
    and its gradients are multiplied after it. Clipping and the learning rate stay with their plugins.
    """
    return {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_allreduce_op": "mean" if options.stage == 3 else "sum",
        "gradient_clipping": 0.0,
        "communication_data_type": NAMES[policy.reduce],
        "bf16": {"enabled": policy.param == torch.bfloat16 and options.stage > 0, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": NAMES[policy.kept] if options.stage > 0 else None},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero_section(options, gpu=gpu, disk=disk, wide=wide(options, policy)),
        "timers": {"throughput": {"enabled": False}},
    }


def wide(options: Options, policy: Policy) -> bool:
    """Whether DeepSpeed takes its optimizer for bf16 with fp32 gradients, which has its own ways to reduce."""
    return (
        options.stage == 1
        and options.offload_optimizer == "none"
        and policy.param == torch.bfloat16
        and policy.kept == torch.float32
    )


def zero_section(options: Options, *, gpu: bool, disk: str | None, wide: bool) -> Config:
    """``zero_optimization``; what is absent is DeepSpeed's default."""
    section: Config = {"stage": options.stage}
    for name in (*PLAIN, *ZERO_KEYS, "sub_group_size"):
        value = getattr(options, name)
        if value is not None:
            section[ZERO_KEYS.get(name, name)] = value
    if options.stage == 3:
        section["memory_efficient_linear"] = False  # it would replace torch's linear in the whole process
    if options.stage in (1, 2) and options.offload_optimizer == "none" and not wide:
        section["compute_grad_norm"] = False  # `clip` does it
    places = {"offload_optimizer": options.offload_optimizer, "offload_param": options.offload_parameters}
    for name, place in places.items():
        if place != "none":
            pinned = gpu if options.pin_memory is None else options.pin_memory
            section[name] = {"device": place, "pin_memory": pinned}
            if place == "nvme":
                section[name]["nvme_path"] = disk
    return section


def effective(config: Config) -> Config:
    """``config`` with DeepSpeed's own defaults filled in; DeepSpeed reads it back as the same configuration."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    old = {
        name
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated")
    }
    filled = DeepSpeedZeroConfig(**config["zero_optimization"])
    section = filled.model_dump(mode="json", by_alias=True, exclude=old, exclude_none=True)
    return {**config, "zero_optimization": section}


def write(config: Config, folder: Path) -> Path:
    """Write the effective configuration to ``deepspeed.json`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(effective(config), indent=2) + "\n")
    return path
