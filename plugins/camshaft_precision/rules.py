"""Which dtypes go together, and where. Without torch."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import camshaft

if TYPE_CHECKING:
    from camshaft_precision import Options

NARROW = frozenset({"bf16", "fp16"})
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def computes(options: Options) -> str:
    """Dtype of matrix products, beside fp8, as far as the options tell; ``auto`` where the device decides."""
    if options.compute == "fp8":
        return "bf16"
    narrow = options.parameters in NARROW
    return options.parameters if options.compute == "auto" and narrow and options.parameters else options.compute


def scales(options: Options) -> bool:
    """Whether the loss is scaled."""
    return computes(options) == "fp16"


def widths(options: Options, device: str) -> camshaft.Widths:
    """Bytes of an element of each kind. Where ``auto`` leaves the dtype of products to the device, the wide one counts
    on a CPU and bf16 elsewhere: it changes none of the others.
    """
    wide = "fp64" if options.compute == "fp64" else "fp32"
    param = options.parameters or wide
    usual = "bf16" if device != "cpu" and computes(options) == "auto" else wide
    return camshaft.Widths(
        param=BYTES[param],
        gradient=BYTES[options.gradients or param],
        reduce=BYTES[options.reduce or wide],
        master=BYTES[wide],
        compute=BYTES.get(computes(options), BYTES[usual]),
    )


def problems(options: Options, key: str) -> Iterator[camshaft.Problem]:
    """Every fault of the options; ``key`` is the plugin's place in the recipe."""
    yield from _of_parameters(options, key)
    yield from _of_gradients(options, key)
    yield from _of_scaling(options, key)
    yield from _of_fp8(options, key)


def _of_fp8(options: Options, key: str) -> Iterator[camshaft.Problem]:
    chosen = options.fp8
    if options.compute != "fp8":
        if "fp8" in options.model_fields_set:
            yield camshaft.Problem(
                f"only compute fp8 reads 'fp8', and compute is {options.compute}",
                key=f"{key}.fp8",
                fix=f"remove it, or set {key}.compute=fp8",
            )
        return
    if chosen.scaling == "delayed" and chosen.recipe == "rowwise":
        yield camshaft.Problem(
            "delayed scaling keeps one scale for each tensor, and rowwise has one for each row",
            key=f"{key}.fp8.scaling",
            fix=f"set {key}.fp8.scaling=current, or {key}.fp8.recipe=tensorwise",
        )
    if chosen.scaling == "current" and "history" in chosen.model_fields_set:
        yield camshaft.Problem(
            "only delayed scaling looks at past windows",
            key=f"{key}.fp8.history",
            fix=f"remove it, or set {key}.fp8.scaling=delayed",
        )


def device_problems(options: Options, context: camshaft.PlanContext, key: str) -> Iterator[camshaft.Problem]:
    """What fp8 needs and this machine or the recipe's other plugins lack."""
    if options.compute != "fp8":
        return
    if context.device == "cpu":
        yield camshaft.Problem(
            "fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), and this run is on a CPU",
            key=f"{key}.compute",
            fix=f"set {key}.compute=bf16",
        )
    elif context.device == "cuda":
        old = [each for each in gpus() if each[1] < (8, 9)]
        if old:
            name, (major, minor) = old[0]
            yield camshaft.Problem(
                f"fp8 needs a GPU of compute capability 8.9 or newer, and {name} has {major}.{minor}",
                key=f"{key}.compute",
                fix=f"set {key}.compute=bf16",
            )
    if options.fp8.scaling == "delayed" and "compile" in context.plugins:
        yield camshaft.Problem(
            "delayed scaling writes what it has seen while a forward runs, which a compiled graph cannot do",
            key=f"{key}.fp8.scaling",
            fix=f"set {key}.fp8.scaling=current, or plugins.compile=null",
        )


@cache
def gpus() -> tuple[tuple[str, tuple[int, int]], ...]:
    """Name and compute capability of this machine's NVIDIA GPUs, as far as their tool tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        rows = [line.rsplit(",", 1) for line in answer.splitlines() if line.strip()]
        return tuple((name.strip(), (int(major), int(minor))) for name, (major, minor) in map(_split, rows))
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()  # the run itself looks again


def _split(row: list[str]) -> tuple[str, list[str]]:
    name, capability = row
    return name, capability.strip().split(".")


def _of_parameters(options: Options, key: str) -> Iterator[camshaft.Problem]:
    compute, parameters = computes(options), options.parameters
    if parameters in NARROW and compute != parameters:
        yield camshaft.Problem(
            f"parameters in {parameters} and matrix products in {compute}: each weight is rounded to {parameters}, and "
            f"{compute} brings nothing of it back",
            key=f"{key}.parameters",
            fix=f"set {key}.compute={parameters}, or remove `parameters`",
        )
    if compute == "fp64":
        for name in ("parameters", "gradients", "reduce"):
            value = getattr(options, name)
            if value is not None and not (name == "parameters" and value in NARROW):
                yield camshaft.Problem(
                    f"{name} in {value} beside compute fp64, in which everything is fp64",
                    key=f"{key}.{name}",
                    fix=f"remove `{name}`, or set {key}.compute=fp32",
                )


def _of_gradients(options: Options, key: str) -> Iterator[camshaft.Problem]:
    compute, parameters = computes(options), options.parameters or "fp32"
    if compute == "fp64":
        return
    if options.gradients not in (None, "fp32", parameters):
        yield camshaft.Problem(
            f"gradients in {options.gradients} of parameters in {parameters}: they are kept in the parameters' dtype "
            "or in fp32",
            key=f"{key}.gradients",
            fix=f"set {key}.parameters={options.gradients}, or remove `gradients`",
        )
    if options.reduce == "fp16" and compute != "fp16":
        yield camshaft.Problem(
            f"gradients travel in fp16, and with compute {compute} nothing scales the loss: what is below 6e-8 would "
            "vanish, what is above 65,504 overflow",
            key=f"{key}.reduce",
            fix=f"set {key}.reduce=bf16, or {key}.compute=fp16",
        )


def _of_scaling(options: Options, key: str) -> Iterator[camshaft.Problem]:
    if not scales(options):
        for name in ("initial_loss_scale", "growth_interval"):
            if name in options.model_fields_set:
                yield camshaft.Problem(
                    f"only compute fp16 scales the loss; with {computes(options)} nothing reads '{name}'",
                    key=f"{key}.{name}",
                    fix=f"remove it, or set {key}.compute=fp16",
                )
    elif math.frexp(options.initial_loss_scale)[0] != 0.5:
        nearest = 2 ** round(math.log2(options.initial_loss_scale))
        yield camshaft.Problem(
            f"a loss scale of {options.initial_loss_scale:g} would round every gradient: it must be a power of two",
            key=f"{key}.initial_loss_scale",
            fix=f"set it to {nearest}",
        )
