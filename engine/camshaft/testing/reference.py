"""The reference: one plain process, a plain loop, torch's own optimizer and clipping, the whole batch at once.

It shares the model, its first values and the samples with the engine, and nothing of the step: no program, no hooks,
no plugins, no accumulation.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from camshaft.data.loader import Loader
from camshaft.models.init import materialize
from camshaft.models.llama import Llama
from camshaft.recipe import check
from camshaft.recipe.length import sample_limit, total_steps
from camshaft.state import BatchPlan
from camshaft.testing.ranks import run_ranks
from camshaft.testing.record import StepRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from camshaft.data import Prepared
    from camshaft.recipe import Resolved

WIDE = {"fp64": torch.float64}
"""Of what the optimizer updates; fp32 where nothing is said."""
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
TIMEOUT_S = 600.0


def plain_run(
    resolved: Resolved,
    data: Prepared,
    optimizer: Callable[[Llama], Optimizer],
    *,
    compute: str,
    max_norm: float | None,
    factor: Callable[[int, int], float] = lambda step, total: 1.0,
    prepare: Callable[[Llama], Any] = lambda model: None,
    parameters: str | None = None,
    loss_scale: tuple[float, int] = (65536.0, 2000),
) -> list[StepRecord]:
    """Train ``resolved`` as a textbook would and record every step.

    ``optimizer`` builds torch's optimizer, ``factor(step, total)`` scales its learning rate, ``prepare`` may freeze
    parameters. ``compute`` is ``fp64``, ``fp32``, ``bf16`` or ``fp16`` (autocast, unless ``parameters`` has the same
    dtype: then a second model in that dtype computes, and the first one holds the fp32 weights that are updated).
    fp16 scales the loss with torch's own ``GradScaler`` (first scale and growth interval in ``loss_scale``); the
    optimizer must not be fused then. The norm of a skipped step is None.

    Beside a GPU it runs in a fork: a first backward starts a thread for each device, and autograd then refuses to run
    in what is forked from there, as ranks are.
    """
    run = partial(
        _run,
        resolved,
        data,
        optimizer,
        compute=compute,
        max_norm=max_norm,
        factor=factor,
        prepare=prepare,
        parameters=parameters,
        loss_scale=loss_scale,
    )
    if not torch.cuda.is_available():
        return run()
    (records,) = run_ranks(1, lambda rank, world_size: run(), timeout_s=TIMEOUT_S)
    found: list[StepRecord] = records
    return found


def _run(
    resolved: Resolved,
    data: Prepared,
    optimizer: Callable[[Llama], Optimizer],
    *,
    compute: str,
    max_norm: float | None,
    factor: Callable[[int, int], float],
    prepare: Callable[[Llama], Any],
    parameters: str | None,
    loss_scale: tuple[float, int],
) -> list[StepRecord]:
    """All of it, in this process."""
    recipe = resolved.recipe
    config = check(resolved, 1).require().config
    assert config is not None
    with torch.device("meta"):
        model = Llama(config)
    prepare(model)
    materialize(model, seed=recipe.seed, device=torch.device("cpu"), dtype=WIDE.get(compute, torch.float32))
    computing = model if parameters is None else copy.deepcopy(model).to(NARROW[parameters])
    chosen = optimizer(model)
    rates = [group["lr"] for group in chosen.param_groups]
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=loss_scale[0], growth_interval=loss_scale[1], enabled=compute == "fp16"
    )
    samples = sample_limit(recipe, len(data.train))
    steps = total_steps(recipe, samples, recipe.batch.global_batch_size)
    whole = BatchPlan(recipe.batch.global_batch_size, recipe.batch.global_batch_size, 1)
    loader = Loader(data.train, whole, index=0, degree=1, seed=recipe.seed, stop=samples)
    loader.seek(0)
    records = []
    for step in range(steps):
        window = loader.next()
        assert window is not None
        (batch,) = window.batches
        cast = compute in NARROW and parameters is None
        with torch.autocast("cpu", dtype=NARROW.get(compute), enabled=cast):
            loss = computing(batch) / int((batch.labels >= 0).sum())
        scaler.scale(loss).backward()
        _move_gradients(computing, model)
        scaler.unscale_(chosen)
        raw = _gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm) if max_norm is not None else None
        for group, rate in zip(chosen.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step, steps)
        before = scaler.get_scale()
        scaler.step(chosen)
        scaler.update()
        _end_step(model, computing)
        records.append(
            StepRecord(
                step=step + 1,
                gradients=raw,
                norm=None if norm is None or scaler.get_scale() < before else float(norm),
                weights=_weights(model, computing),
                optimizer=_optimizer_state(model, chosen),
                loss=float(loss.detach()),
                lr=float(chosen.param_groups[0]["lr"]),
            )
        )
    loader.close()
    return records


def _move_gradients(computing: Module, model: Module) -> None:
    for narrow, wide in zip(computing.parameters(), model.parameters(), strict=True):
        if narrow is not wide:
            wide.grad = None if narrow.grad is None else narrow.grad.to(wide.dtype)
            narrow.grad = None


def _end_step(model: Module, computing: Module) -> None:
    with torch.no_grad():
        for wide, narrow in zip(model.parameters(), computing.parameters(), strict=True):
            wide.grad = None
            if narrow is not wide:
                narrow.copy_(wide)


def _gradients(model: Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def _weights(model: Module, computing: Module) -> dict[str, Tensor]:
    """What is updated; of frozen parameters, what is computed with."""
    used = dict(computing.named_parameters())
    return {
        name: (wide if wide.requires_grad else used[name]).detach().clone() for name, wide in model.named_parameters()
    }


def _optimizer_state(model: Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().clone()
        for name, parameter in model.named_parameters()
        for key, value in dict[str, Any](optimizer.state.get(parameter, {})).items()
        if value is not None
    }
