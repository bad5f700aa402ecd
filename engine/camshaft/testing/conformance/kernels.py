"""Every kernel that a plugin offers beside torch's own form in fp64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from camshaft import ops
from camshaft.testing.conformance import updates

if TYPE_CHECKING:
    from camshaft.ops import Kernel

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
    # rows of 16 bytes, as torch's own asks for
    "grouped_matmul": lambda: ((_normal(TOKENS, 32), _normal(3, 32, 16)), (0, 1)),
}
"""Arguments of each operation in fp64. ``document_attention`` gets documents, of which its own mask is made."""


def _projected(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ops.cross_entropy(hidden @ weight.T, labels)


def _norm(tensors: list[Tensor]) -> Tensor:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt().to(wide)


def _grouped(rows: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
    ends = offs.tolist()
    spans = zip([0, *ends[:-1]], ends, matrices, strict=True)
    return torch.cat([rows[begin:end] @ matrix for begin, end, matrix in spans])


EAGER: Mapping[str, Callable[..., Any]] = {
    "linear_cross_entropy": _projected,
    "grad_norm": _norm,
    "grouped_matmul": _grouped,
}
"""torch's form of operations that ``Ops`` has none for."""
SUMS = ("cross_entropy", "linear_cross_entropy", "grad_norm")
"""Operations whose result may be wider than torch's."""
NAMED: Mapping[str, Callable[[], dict[str, Any]]] = {
    "grouped_matmul": lambda: {"offs": torch.tensor([5, 5, TOKENS], dtype=torch.int32)},
}
"""Arguments that have names."""


@dataclass(frozen=True)
class Reference:
    """What an operation of somebody's own is compared with. ``make`` returns its arguments in fp64 and the places of
    those that have gradients; ``eager`` is its plain form.
    """

    make: Callable[[], Made]
    eager: Callable[..., Any]


References = Mapping[str, Reference]


def known() -> dict[str, Reference]:
    """Operation of ``camshaft.ops`` to what it is compared with."""
    return {op: Reference(make, EAGER.get(op) or getattr(ops.Ops(), op)) for op, make in ARGUMENTS.items()}


@dataclass(frozen=True)
class Result:
    """What an operation made with gradients and without, and the gradients of its arguments; and what it wrote over."""

    tensors: tuple[Tensor, ...]
    labels: tuple[str, ...]
    written: tuple[str, ...]


def run(op: str, reference: Reference, call: Callable[..., Any], mask: Any, dtype: torch.dtype, device: str) -> Result:
    """``op`` on its arguments in ``dtype``, with a fixed gradient of everything that it returns."""
    torch.manual_seed(7)
    made, leaves = reference.make()
    named = {key: value.to(device) for key, value in NAMED.get(op, dict)().items()}
    arguments = [_cast(each, dtype, device) for each in made]
    for index in leaves:
        arguments[index].requires_grad_()
    if op == "rope":
        arguments.append(dtype)
    if op == "document_attention":
        arguments[3] = mask(arguments[3])
    before = [each.detach().clone() for each in _tensors(arguments)]
    with torch.no_grad():
        quiet = _tuple(call(*arguments, **named))
    found = [(f"result {index} in evaluation", each) for index, each in enumerate(quiet)]
    if leaves:
        outputs = _tuple(call(*arguments, **named))
        grads = [torch.randn(each.shape, dtype=torch.float64).to(each) for each in outputs]
        upstream = [each.clone() for each in grads]
        slopes = torch.autograd.grad(outputs, [arguments[index] for index in leaves], grads)
        found += [(f"result {index}", each.detach()) for index, each in enumerate(outputs)]
        found += [(f"gradient of argument {index}", each) for index, each in zip(leaves, slopes, strict=True)]
        written = ["the gradient of a result"] * (not all(map(torch.equal, grads, upstream)))
    else:
        written = []
    same = [torch.equal(one, other.detach()) for one, other in zip(before, _tensors(arguments), strict=True)]
    written += ["an argument"] * (not all(same))
    return Result(tuple(each for _, each in found), tuple(label for label, _ in found), tuple(written))


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _cast(value: Any, dtype: torch.dtype, device: str) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_cast(each, dtype if isinstance(value, list) else each.dtype, device) for each in value)
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    return value


def faults(kernel: Kernel, dtype: torch.dtype, device: str, own: References | None = None) -> list[str]:
    """One line for each result of ``kernel`` that is further from fp64 than its bound, and for what else is wrong.

    Every entry that it replaces is tried; optimizer steps in fp32 alone, which they work on. ``own``: references of
    operations of somebody's own.

    Raises:
        NoReference: it replaces what there is nothing to compare with.
    """
    entries, references = dict(kernel.entries()), {**known(), **(own or {})}
    table = ops.Ops()
    table.replace(entries)
    if entries and not {kernel.op, f"updates.{kernel.op}", f"others.{kernel.op}"} & entries.keys():
        return [f"{kernel.op} by {kernel.provider} replaces {', '.join(entries)}, and not {kernel.op}"]
    mask = entries.pop("document_mask", ops.document_mask)
    found: list[str] = []
    for name, call in entries.items():
        family, _, op = name.rpartition(".")
        if family == "updates":
            if dtype == torch.float32:
                found += updates.faults(op, kernel.provider, call, device)
        elif op not in references:
            raise updates.NoReference(f"the kit has nothing to compare '{name}' with")
        elif call is not None:  # None: switched off, its callers do without
            lines = _faults(op, references[op], call, mask, dtype, device)
            found += [f"{op} by {kernel.provider}, {dtype}, {line}" for line in lines]
    return found


def _faults(
    op: str, reference: Reference, call: Callable[..., Any], mask: Any, dtype: torch.dtype, device: str
) -> Iterator[str]:
    eager, plain = reference.eager, ops.document_mask
    wanted = run(op, reference, eager, plain, torch.float64, device).tensors
    own = run(op, reference, eager, plain, dtype, device).tensors
    got = run(op, reference, call, mask, dtype, device)
    if len(got.tensors) != len(wanted):
        yield f"{len(got.tensors)} results in place of {len(wanted)}"
        return
    for label, one, same, exact in zip(got.labels, got.tensors, own, wanted, strict=True):
        limit = BOUNDS[dtype] if dtype == torch.float32 else max(BOUNDS[dtype], 1.5 * _far(same, exact))
        if not _far(one, exact) <= limit:
            yield f"{label}: {_far(one, exact):.2e} > {limit}"
        wide = op in SUMS and label.startswith("result") and torch.promote_types(one.dtype, same.dtype) == one.dtype
        if one.dtype != same.dtype and not wide:
            yield f"{label} is {one.dtype}, and should be {same.dtype}"
    yield from (f"writes over {what}" for what in got.written)


def _far(one: Tensor, exact: Tensor) -> float:
    if one.shape != exact.shape:
        return float("inf")
    one, exact = one.double().cpu(), exact.double().cpu()
    return float((one - exact).norm() / exact.norm().clamp_min(1e-30))
