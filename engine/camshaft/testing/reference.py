"""The reference: one plain process, a plain loop, torch's own optimizer and clipping, the whole batch at once.

It shares the model, its first values and the samples with the engine, and nothing of the step: no program, no hooks,
no plugins, no accumulation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from camshaft.data.loader import Loader
from camshaft.loop import sample_limit, total_steps
from camshaft.models.init import materialize
from camshaft.models.llama import Llama
from camshaft.recipe import check
from camshaft.state import BatchPlan
from camshaft.testing.record import StepRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from camshaft.data import Prepared
    from camshaft.recipe import Resolved

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}


def plain_run(
    resolved: Resolved,
    data: Prepared,
    optimizer: Callable[[Llama], Optimizer],
    *,
    compute: str,
    max_norm: float | None,
    factor: Callable[[int, int], float] = lambda step, total: 1.0,
    prepare: Callable[[Llama], Any] = lambda model: None,
) -> list[StepRecord]:
    """Train ``resolved`` as a textbook would and record every step.

    ``optimizer`` builds torch's optimizer, ``factor(step, total)`` scales its learning rate, ``prepare`` may freeze
    parameters. ``compute`` is ``fp64``, ``fp32`` or ``bf16`` (autocast).
    """
    recipe = resolved.recipe
    config = check(resolved, 1).require().config
    assert config is not None
    with torch.device("meta"):
        model = Llama(config)
    prepare(model)
    materialize(model, seed=recipe.seed, device=torch.device("cpu"), dtype=DTYPES[compute])
    chosen = optimizer(model)
    rates = [group["lr"] for group in chosen.param_groups]
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
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == "bf16"):
            loss = model(batch) / int((batch.labels >= 0).sum())
        loss.backward()
        raw = _gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm) if max_norm is not None else None
        for group, rate in zip(chosen.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step, steps)
        chosen.step()
        chosen.zero_grad()
        records.append(
            StepRecord(
                step=step + 1,
                gradients=raw,
                norm=None if norm is None else float(norm),
                weights=_weights(model),
                optimizer=_optimizer_state(model, chosen),
                loss=float(loss.detach()),
                lr=float(chosen.param_groups[0]["lr"]),
            )
        )
    loader.close()
    return records


def _gradients(model: Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def _weights(model: Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _optimizer_state(model: Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().clone()
        for name, parameter in model.named_parameters()
        for key, value in dict[str, Any](optimizer.state.get(parameter, {})).items()
        if value is not None
    }
