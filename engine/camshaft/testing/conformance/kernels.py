"""Every kernel that a plugin offers beside torch's own form in fp64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from camshaft import ops

if TYPE_CHECKING:
    from camshaft.ops import Kernel
    from camshaft.state import World

ROWS, TOKENS, HEADS, GROUPS, WIDTH, FEATURES, VOCABULARY = 2, 13, 4, 2, 8, 33, 59
"""Odd where they may be: no block of a kernel divides them."""
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative L2 distance from fp64; in bf16 also 1.5 times what torch's own form has, where that is more."""

Made = tuple[tuple[Any, ...], tuple[int, ...]]
"""Arguments of an operation, and the places of those that have gradients."""


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _heads(count: int) -> Tensor:
    return _normal(ROWS, TOKENS, count, WIDTH)


def _angles() -> tuple[Tensor, Tensor]:
    turn = torch.rand(ROWS, TOKENS, 1, WIDTH, dtype=torch.float64) * 6
    sign = torch.ones(WIDTH, dtype=torch.float64)
    sign[: WIDTH // 2] = -1
    return turn.cos().float(), (turn.sin() * sign).float()


def _labels() -> Tensor:
    found = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
    found[0, ::3] = ops.IGNORED
    return found


def _documents() -> Tensor:
    return (torch.arange(TOKENS) // 5).expand(ROWS, TOKENS).contiguous()


ARGUMENTS: Mapping[str, Callable[[], Made]] = {
    "rms_norm": lambda: ((_normal(ROWS, TOKENS, FEATURES), _normal(FEATURES), 1e-5), (0, 1)),
    "add_rms_norm": lambda: (
        (_normal(ROWS, TOKENS, FEATURES), _normal(ROWS, TOKENS, FEATURES), _normal(FEATURES), 1e-5),
        (0, 1, 2),
    ),
    "layer_norm": lambda: (
        (_normal(ROWS, TOKENS, FEATURES), _normal(FEATURES), _normal(FEATURES), 1e-5),
        (0, 1, 2),
    ),
    "rope": lambda: ((_heads(HEADS), _heads(GROUPS), _angles()), (0, 1)),
    "swiglu": lambda: ((_normal(ROWS, TOKENS, FEATURES), _normal(ROWS, TOKENS, FEATURES)), (0, 1)),
    "attention": lambda: ((_heads(HEADS), _heads(GROUPS), _heads(GROUPS)), (0, 1, 2)),
    "document_attention": lambda: ((_heads(HEADS), _heads(GROUPS), _heads(GROUPS), _documents()), (0, 1, 2)),
    "cross_entropy": lambda: ((_normal(ROWS, TOKENS, VOCABULARY) * 3, _labels()), (0,)),
    "linear_cross_entropy": lambda: (
        (_normal(ROWS, TOKENS, FEATURES), _normal(VOCABULARY, FEATURES) / 3, _labels()),
        (0, 1),
    ),
    "grad_norm": lambda: (([_normal(7, 5), _normal(3), _normal(0)],), ()),
}
"""Arguments of each operation in fp64. ``document_attention`` gets documents, of which its own mask is made."""


def _projected(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ops.cross_entropy(hidden @ weight.T, labels)


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()


EAGER: Mapping[str, Callable[..., Any]] = {"linear_cross_entropy": _projected, "grad_norm": _norm}
"""torch's form of operations that ``Ops`` has none for."""


@dataclass(frozen=True)
class Result:
    """What an operation made, and the gradients of its arguments, in fp64."""

    tensors: tuple[Tensor, ...]


def run(op: str, call: Callable[..., Any], mask: Callable[..., Any], dtype: torch.dtype, device: str) -> Result:
    """``op`` on its arguments in ``dtype``, with a fixed gradient of everything that it returns."""
    torch.manual_seed(7)
    made, leaves = ARGUMENTS[op]()
    arguments = [_cast(each, dtype, device) for each in made]
    for index in leaves:
        arguments[index].requires_grad_()
    if op == "rope":
        arguments.append(dtype)
    if op == "document_attention":
        arguments[3] = mask(arguments[3])
    outputs = call(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not leaves:
        return Result(tuple(each.double().cpu() for each in outputs))
    grads = [torch.randn(each.shape, dtype=torch.float64).to(each) for each in outputs]
    found = torch.autograd.grad(outputs, [arguments[index] for index in leaves], grads)
    return Result(tuple(each.detach().double().cpu() for each in (*outputs, *found)))


def _cast(value: Any, dtype: torch.dtype, device: str) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_cast(each, dtype if isinstance(value, list) else each.dtype, device) for each in value)
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    return value


def faults(kernel: Kernel, world: World, dtype: torch.dtype, device: str) -> list[str]:
    """One line for each result of ``kernel`` that is further from fp64 than its bound.

    Raises:
        LookupError: it offers an operation that there are no arguments for.
    """
    if kernel.op not in ARGUMENTS:
        raise LookupError(f"the kit has no arguments for operation '{kernel.op}'")
    table = ops.Ops()
    table.replace(kernel.entries())
    call = getattr(table, kernel.op)
    if call is None:  # an operation that is switched off: its callers do without
        return []
    eager = EAGER.get(kernel.op) or getattr(ops.Ops(), kernel.op)
    wanted = run(kernel.op, eager, ops.document_mask, torch.float64, device).tensors
    own = run(kernel.op, eager, ops.document_mask, dtype, device).tensors
    got = run(kernel.op, call, table.document_mask, dtype, device).tensors
    found = []
    for index, (one, plain, exact) in enumerate(zip(got, own, wanted, strict=True)):
        limit = BOUNDS[dtype] if dtype == torch.float32 else max(BOUNDS[dtype], 1.5 * _far(plain, exact))
        if not _far(one, exact) <= limit:
            found.append(f"{kernel.op} by {kernel.provider}, {dtype}, result {index}: {_far(one, exact):.2e} > {limit}")
    return found


def _far(one: Tensor, exact: Tensor) -> float:
    if one.shape != exact.shape:
        return float("inf")
    return float((one - exact).norm() / exact.norm().clamp_min(1e-30))
