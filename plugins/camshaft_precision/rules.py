"""Which dtypes go together. Pure, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import camshaft

if TYPE_CHECKING:
    from camshaft_precision import Options

NARROW = frozenset({"bf16", "fp16"})
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def computes(options: Options) -> str:
    """Dtype of matrix products as far as the options tell; ``auto`` where the device decides."""
    narrow = options.parameters in NARROW
    return options.parameters if options.compute == "auto" and narrow and options.parameters else options.compute


def scales(options: Options) -> bool:
    """Whether the loss is scaled."""
    return computes(options) == "fp16"


def widths(options: Options) -> camshaft.Widths:
    """Bytes of an element of each kind. Where ``auto`` leaves the dtype of products to the device, the wide one counts:
    it changes none of the others.
    """
    wide = "fp64" if options.compute == "fp64" else "fp32"
    param = options.parameters or wide
    return camshaft.Widths(
        param=BYTES[param],
        gradient=BYTES[options.gradients or param],
        reduce=BYTES[options.reduce or wide],
        master=BYTES[wide],
        compute=BYTES.get(computes(options), BYTES[wide]),
    )


def problems(options: Options, key: str) -> Iterator[camshaft.Problem]:
    """Every fault of the options; ``key`` is the plugin's place in the recipe."""
    yield from _of_parameters(options, key)
    yield from _of_gradients(options, key)
    yield from _of_scaling(options, key)


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
