"""A catalogue of faults: one sign, one factor, one reduction that is left out, in every shipped plugin.

Each is planted where the plugin's own code is, by putting another function in the place of one of its functions before
ranks are forked. ``sign`` is what the first sign of it must name, beside the plugin.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from verify_changes import (
    Change,
    after,
    before,
    dtype,
    every_copy,
    forget_total,
    group,
    half_back,
    half_sent,
    here_alone,
    instead,
    mean_of_means,
    narrow_loss,
    no_last_bucket,
    no_scatter,
    no_sum,
    off_by_one,
    only_last,
    opposite,
    other_values,
    own_tokens,
    scale_bucket,
    shaken,
    skip,
    times,
    told_copies,
    without_others,
)


@dataclass(frozen=True)
class Fault:
    name: str
    recipe: str
    plugin: str
    target: str
    """``module:attribute`` or ``module:Class.attribute``."""
    change: Change
    sign: str = ""

    def __str__(self) -> str:
        return f"{self.plugin}: {self.name}"


@contextmanager
def planted(fault: Fault):
    """The fault is there inside of this block, and in processes that are forked in it."""
    module, _, path = fault.target.partition(":")
    *owners, leaf = path.split(".")
    place: Any = importlib.import_module(module)
    for owner in owners:
        place = getattr(place, owner)
    right = vars(place)[leaf]
    plain = right.__func__ if isinstance(right, staticmethod) else right
    wrong = wraps(plain)(fault.change(plain))
    setattr(place, leaf, staticmethod(wrong) if isinstance(right, staticmethod) else wrong)
    try:
        yield
    finally:
        setattr(place, leaf, right)


DDP, BUCKET = "camshaft_ddp.reducer:Reducer", "camshaft_ddp.bucket:Bucket"
ZERO, STORAGE = "camshaft_zero.reducer:Reducer", "camshaft_zero.storage"
TP = "camshaft_tensor_parallel"
PIPELINE = "camshaft_pipeline"
CLIP = "camshaft_clip.norm:Clipper"

FAULTS = (
    Fault("buckets are not summed", "ddp", "ddp", f"{BUCKET}.launch", instead(no_sum)),
    Fault("mean instead of sum", "ddp", "ddp", f"{BUCKET}.finish", scale_bucket(0.5), "gradients"),
    Fault("sign", "ddp", "ddp", f"{BUCKET}.finish", scale_bucket(-1.0), "gradients"),
    Fault(
        "factor on one gradient of a bucket", "ddp", "ddp", f"{BUCKET}.finish", scale_bucket(2.0, slice(1)), "gradients"
    ),
    Fault("last microbatch alone", "ddp", "ddp", f"{DDP}.end_backward", after(only_last), "gradients"),
    Fault("stretches are not summed", "zero1", "zero", f"{ZERO}._start", instead(no_scatter), "gradients"),
    Fault("sign", "zero2", "zero", f"{ZERO}.gradient", times(-1.0), "gradients"),
    Fault("factor", "zero3", "zero", f"{ZERO}.gradient", times(2.0), "gradients"),
    Fault("last microbatch alone", "zero2", "zero", f"{ZERO}._settle_oldest", before(forget_total), "gradients"),
    Fault("copies are not summed", "hybrid", "zero", f"{ZERO}._sum_copies", instead(skip)),
    Fault("a bucket is not published", "zero1", "zero", "camshaft_zero.publisher:Publisher.start", no_last_bucket),
    Fault("nothing is published", "zero1", "zero", "camshaft_zero.native:Native.publish", instead(skip)),
    Fault("first values of another seed", "zero3", "zero", "camshaft_zero.native:give_values", other_values, "weights"),
    Fault(
        "gradients of a region's input are not summed",
        "tp",
        "tensor_parallel",
        f"{TP}.line:_Enter.backward",
        instead(lambda ctx, gradient: (gradient.clone(), None)),
        "gradients",
    ),
    Fault(
        "factor on what leaves a region", "tp", "tensor_parallel", f"{TP}.line:_Leave.backward", times(0.5), "gradients"
    ),
    Fault("shared heads are not summed", "tp", "tensor_parallel", f"{TP}.copies:Copies.sum", instead(skip)),
    Fault("norms are not summed", "sp", "tensor_parallel", f"{TP}.copies:Copies.sum", instead(skip)),
    Fault(
        "tokens' gradients are not summed",
        "sp",
        "tensor_parallel",
        f"{TP}.line:_Gather.backward",
        instead(own_tokens),
        "gradients",
    ),
    Fault("copies are told to be alone", "tp", "tensor_parallel", f"{TP}.sharding:box", told_copies(1), "layernorm"),
    Fault("more copies are told than there are", "sp", "tensor_parallel", f"{TP}.sharding:box", told_copies(3)),
    Fault("row of the table off by one", "sp", "tensor_parallel", f"{TP}.vocabulary:Range.places", off_by_one),
    Fault(
        "sign of the loss's gradient",
        "tp",
        "tensor_parallel",
        f"{TP}.vocabulary:_CrossEntropy.backward",
        times(-1.0),
        "gradients",
    ),
    Fault(
        "half the gradient to the stage before",
        "1f1b",
        "pipeline",
        f"{PIPELINE}.executor:Executor._hand_back",
        half_back,
        "gradients",
    ),
    Fault(
        "averages over microbatches",
        "interleaved",
        "pipeline",
        f"{PIPELINE}.executor:Executor._begin_backward",
        mean_of_means,
        "gradients",
    ),
    Fault(
        "gradient of a tied copy is lost",
        "1f1b",
        "pipeline",
        f"{PIPELINE}.ties:Owner._join",
        instead(lambda owner, gradient: None),
        "embed_tokens",
    ),
    Fault("a tied copy is another", "1f1b", "pipeline", f"{PIPELINE}.ties:Owner._share", half_sent, "embed_tokens"),
    Fault(
        "gradients that W adds are lost",
        "zbv",
        "pipeline",
        f"{PIPELINE}.deferral:Deferral.weights",
        without_others,
        "gradients",
    ),
    Fault(
        "gradients that I adds are lost", "zbv", "pipeline", f"{PIPELINE}.executor:_add", instead(skip), "embed_tokens"
    ),
    Fault("factor on the coefficient", "ddp", "clip", f"{CLIP}.coefficient", times(0.5), "coefficient"),
    Fault("does not clip", "zero2", "clip", f"{CLIP}.scale", instead(skip), "coefficient"),
    Fault("counts copies twice", "sp", "clip", f"{CLIP}._by_copies", every_copy, "norm"),
    Fault("norm of this rank alone", "zero1", "clip", f"{CLIP}.norm", instead(here_alone)),
    Fault(
        "parameters are narrower",
        "ddp",
        "precision",
        "camshaft_precision.policy:policy",
        dtype(param=torch.float32, compute=torch.float32, master=torch.float32),
    ),
    Fault("reduces in fp32", "ddp", "precision", "camshaft_precision.policy:policy", dtype(reduce=torch.float32)),
    Fault("loss in fp32", "zero1", "precision", "camshaft_precision:Plugin.around_forward", narrow_loss),
    Fault("factor on the rate", "ddp", "adamw", "camshaft_adamw:Plugin.optimizer", group(lr=lambda lr: lr * 2), "lr"),
    Fault(
        "decays what must not", "zero2", "adamw", "camshaft_adamw:Plugin.optimizer", group(weight_decay=0.1), "weights"
    ),
    Fault(
        "betas in the wrong order",
        "ddp",
        "adamw",
        "camshaft_adamw:Plugin.optimizer",
        group(betas=lambda betas: betas[::-1]),
    ),
    Fault("nesterov does nothing", "sgd", "sgd", "camshaft_sgd:Plugin.optimizer", group(nesterov=False), "weights"),
    Fault("sign of the decay", "lion", "lion", "camshaft_lion:Plugin.optimizer", group(weight_decay=-0.3), "weights"),
    Fault(
        "ratios upside down",
        "lamb",
        "lamb",
        "camshaft_lamb.optimizer:Lamb._ratios",
        after(lambda ratios, *_: 1 / ratios),
        "weights",
    ),
    Fault("sign of the step", "lamb", "lamb", "camshaft_lamb.optimizer:Lamb._directions", opposite, "weights"),
    Fault(
        "no limit of updates",
        "adafactor",
        "adafactor",
        "camshaft_adafactor.optimizer:Adafactor._scale",
        instead(skip),
        "weights",
    ),
    Fault(
        "sign of what is orthogonal", "muon", "muon", "camshaft_muon.optimizer:orthogonalize", times(-1.0), "weights"
    ),
    Fault("factor of the shape", "muon", "muon", "camshaft_muon.optimizer:scale", times(0.5), "weights"),
    Fault(
        "one step late",
        "zero1",
        "lr_schedule",
        "camshaft_lr_schedule.shapes:factor",
        lambda right: lambda options, step, total: right(options, max(step - 1, 0), total),
        "lr",
    ),
    Fault("factor on the warm-up", "ddp", "lr_schedule", "camshaft_lr_schedule.shapes:factor", times(0.9), "lr"),
    Fault(
        "is made again otherwise",
        "recompute",
        "recompute",
        "camshaft_recompute.frame:_unpack",
        after(shaken),
        "gradients",
    ),
    Fault(
        "factor on the loss",
        "kernels",
        "kernels",
        "camshaft_kernels.providers.chunked:linear_cross_entropy",
        times(2.0),
    ),
    Fault(
        "factor on reduced gradients",
        "deepspeed",
        "deepspeed",
        "camshaft_deepspeed:Plugin.reduce",
        after(
            lambda _, plugin: (
                [part.tensor.grad.mul_(2) for part in plugin._engine.state.world.parts if part.tensor.grad is not None]
                and None
            )
        ),
        "gradients",
    ),
)
"""Every fault."""
QUICK = ("ddp: buckets are not summed", "zero: factor", "tensor_parallel: norms are not summed",
         "tensor_parallel: copies are told to be alone",
         "pipeline: gradient of a tied copy is lost", "clip: counts copies twice", "precision: parameters are narrower",
         "adamw: decays what must not", "lr_schedule: one step late")  # fmt: skip
"""Those that run without an environment variable."""
