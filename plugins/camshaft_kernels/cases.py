"""What ``camshaft bench kernels`` times: each operation forward and backward, on inputs like those of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from camshaft import ops
from camshaft_kernels.sizes import NAMES

Call = Callable[[], Any]
Entries = Mapping[str, Any]
DTYPES = {name: dtype for dtype, name in NAMES.items()}
HEAD = 64
DOCUMENTS = 8
"""Documents in a row, of uneven lengths."""

UPSTREAM = 0.5

SMALL = {"tokens": (1024, 4096), "width": 512, "vocabulary": 8192, "elements": 4_000_000}
LARGE = {"tokens": (4096, 16384), "width": 4096, "vocabulary": 128_256, "elements": 200_000_000}
"""Of a CPU and of a GPU."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table. ``make`` takes a provider's entries and returns what is timed."""

    op: str
    dtype: str
    size: int
    shape: str
    make: Callable[[Entries], Call]
    traffic: int = 0
    """Bytes that any implementation reads and writes, forward and backward; 0: matrix products take the time."""


def cases(device: torch.device, dtypes: tuple[str, ...], chosen: frozenset[str]) -> Iterator[Case]:
    """Every case for ``device``; ``chosen``: operations, all if empty."""
    grid: Any = LARGE if device.type == "cuda" else SMALL
    for op, builders in _BUILDERS.items():
        if chosen and op not in chosen:
            continue
        for dtype, tokens, build in product(dtypes, grid["tokens"], builders):
            yield build(op, dtype, _Inputs(device, DTYPES[dtype]), tokens, grid)


class _Inputs:
    """Random tensors that are made when they are asked for, of the same sizes and spread for every provider."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def leaf(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, device=self.device, dtype=torch.float32) * scale
        return made.to(dtype or self.dtype).requires_grad_()

    def labels(self, tokens: int, vocabulary: int) -> Tensor:
        return torch.randint(0, vocabulary, (1, tokens), device=self.device)


def _trained(call: Callable[[], Any], leaves: list[Tensor]) -> Call:
    """``call`` and its backward, to gradients that are made anew each time.

    What comes to the outputs is made once: it is no part of what is timed. It is not 1, which some leave out.
    """
    upstream: list[Tensor] = []

    def run() -> None:
        made = call()
        outputs = [each for each in (made if isinstance(made, tuple) else (made,)) if each.requires_grad]
        upstream.extend(torch.full_like(each, UPSTREAM) for each in outputs[len(upstream) :])
        torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    return run


def _pick(entries: Entries, name: str) -> Any:
    """A provider's entry, or torch's own where it offers none."""
    return entries.get(name, getattr(ops, name))


def _norm(op: str, dtype: str, inputs: _Inputs, tokens: int, grid: Any) -> Case:
    width = grid["width"]

    def make(entries: Entries) -> Call:
        one, other, weight = (inputs.leaf(1, tokens, width), inputs.leaf(1, tokens, width), inputs.leaf(width))
        if op == "rms_norm":
            function = _pick(entries, "add_rms_norm")
            return _trained(lambda: function(one, other, weight, 1e-6), [one, other, weight])
        function, bias = _pick(entries, "layer_norm"), inputs.leaf(width)
        return _trained(lambda: function(one, weight, bias, 1e-6), [one, weight, bias])

    passes = 8 if op == "rms_norm" else 5  # with a residual, two more tensors come in and one more goes out
    traffic = passes * tokens * width * inputs.dtype.itemsize
    return Case(op, dtype, tokens * width, f"{tokens} x {width}", make, traffic)


def _rope(op: str, dtype: str, inputs: _Inputs, tokens: int, grid: Any) -> Case:
    heads = grid["width"] // HEAD
    of_keys = max(heads // 4, 1)
    traffic = tokens * HEAD * (4 * (heads + of_keys) * inputs.dtype.itemsize + 4 * torch.float32.itemsize)

    def make(entries: Entries) -> Call:
        q, k = inputs.leaf(1, tokens, heads, HEAD), inputs.leaf(1, tokens, of_keys, HEAD)
        angles = torch.rand(1, tokens, 1, HEAD, device=inputs.device)
        function, turned = _pick(entries, "rope"), (angles.cos(), angles.sin())
        return _trained(lambda: function(q, k, turned, inputs.dtype), [q, k])

    return Case(op, dtype, tokens * grid["width"], f"{tokens} x {heads} heads of {HEAD}", make, traffic)


def _swiglu(op: str, dtype: str, inputs: _Inputs, tokens: int, grid: Any) -> Case:
    inner = grid["width"] * 7 // 2

    def make(entries: Entries) -> Call:
        gate, up, function = inputs.leaf(1, tokens, inner), inputs.leaf(1, tokens, inner), _pick(entries, "swiglu")
        return _trained(lambda: function(gate, up), [gate, up])

    return Case(op, dtype, tokens * inner, f"{tokens} x {inner}", make, 8 * tokens * inner * inputs.dtype.itemsize)


def _attention(op: str, dtype: str, inputs: _Inputs, tokens: int, grid: Any, *, longest: int) -> Case:
    """Rows of at most ``longest`` tokens. Its size is the number of scores."""
    heads, length = grid["width"] // HEAD, min(tokens, longest)
    rows = tokens // length

    def make(entries: Entries) -> Call:
        shape = (rows, length, heads, HEAD)
        q, k, v = (inputs.leaf(*shape) for _ in range(3))
        if op == "attention":
            function = _pick(entries, "attention")
            return _trained(lambda: function(q, k, v), [q, k, v])
        begins = (torch.arange(length, device=inputs.device) * DOCUMENTS / length) ** 2 / DOCUMENTS
        document = begins.to(torch.int32).expand(rows, length)
        function, mask = _pick(entries, "document_attention"), _pick(entries, "document_mask")(document)
        return _trained(lambda: function(q, k, v, mask), [q, k, v])

    return Case(op, dtype, tokens * length * heads, f"{rows} x {length} x {heads} heads of {HEAD}", make)


def _loss(op: str, dtype: str, inputs: _Inputs, tokens: int, grid: Any) -> Case:
    width, vocabulary = grid["width"], grid["vocabulary"]

    def make(entries: Entries) -> Call:
        labels = inputs.labels(tokens, vocabulary)
        if op == "cross_entropy":
            logits, function = inputs.leaf(1, tokens, vocabulary), _pick(entries, "cross_entropy")
            return _trained(lambda: function(logits, labels), [logits])
        # Logits of about 1: far larger ones make probabilities so small that a CPU takes ten times as long.
        hidden, weight = inputs.leaf(1, tokens, width), inputs.leaf(vocabulary, width, scale=width**-0.5)
        fused = entries.get("linear_cross_entropy") or _apart
        return _trained(lambda: fused(hidden, weight, labels), [hidden, weight])

    traffic = 3 * tokens * vocabulary * inputs.dtype.itemsize if op == "cross_entropy" else 0
    return Case(op, dtype, tokens * vocabulary, f"{tokens} x {width} x {vocabulary}", make, traffic)


def _apart(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ops.cross_entropy(F.linear(hidden, weight), labels)


def _update(op: str, dtype: str, inputs: _Inputs, tokens: int, grid: Any) -> Case:
    """``tokens`` is a share here: lists of equally many tensors, of a small and of a large model."""
    elements = grid["elements"] * tokens // grid["tokens"][-1]
    count = 64

    def make(entries: Entries) -> Call:
        parameters = [inputs.leaf(elements // count, dtype=torch.float32) for _ in range(count)]
        gradients = [torch.full_like(each, 1e-3) for each in parameters]
        if op == "grad_norm":
            norm = entries.get("grad_norm") or torch.nn.utils.get_total_norm
            return lambda: norm(gradients)
        scale = torch.ones((), device=inputs.device)
        update = entries.get("updates.adamw")
        return (
            _torch_adamw(parameters, gradients, scale)
            if update is None
            else _adamw(update, parameters, gradients, scale)
        )

    words = 7 if op == "adamw" else 1  # four are read and three written
    return Case(op, dtype, elements, f"{count} x {elements // count}", make, words * elements * torch.float32.itemsize)


def _torch_adamw(parameters: list[Tensor], gradients: list[Tensor], scale: Tensor) -> Call:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient

    def run() -> None:
        torch._foreach_mul_(gradients, scale)
        optimizer.step()

    return run


def _adamw(update: Any, parameters: list[Tensor], gradients: list[Tensor], scale: Tensor) -> Call:
    plain = [each.detach() for each in parameters]
    means, squares = [[torch.zeros_like(each) for each in plain] for _ in range(2)]
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "scale": scale}
    return lambda: update(plain, gradients, means, squares, 3, **options)


_ROWS = (partial(_attention, longest=256), partial(_attention, longest=4096))
_BUILDERS: Mapping[str, tuple[Callable[[str, str, _Inputs, int, Any], Case], ...]] = {
    "rms_norm": (_norm,),
    "layer_norm": (_norm,),
    "rope": (_rope,),
    "swiglu": (_swiglu,),
    "attention": _ROWS,
    "document_attention": _ROWS,
    "linear_cross_entropy": (_loss,),
    "cross_entropy": (_loss,),
    "adamw": (_update,),
    "grad_norm": (_update,),
}
TIMED = frozenset(_BUILDERS)
"""Operations of which there is more than one provider that can be timed alone."""
