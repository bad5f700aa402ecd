"""How the kit compares kernels: what it tries of each, and that it finds what is wrong."""

from __future__ import annotations

import functools

import pytest
import torch

from camshaft import ops
from camshaft.ops import Kernel
from camshaft.testing.conformance import kernels, updates

OWN = {name: reference.eager for name, reference in kernels.known().items()}


def faults(op, entries, dtype=torch.float32, own=None):
    """What is said of a kernel of ``op`` that replaces ``entries``."""
    return kernels.faults(Kernel(op, "mine", lambda: entries), dtype, "cpu", own)


@pytest.mark.parametrize("op", OWN)
def test_torchs_own_form_of_each_operation_is_within_the_bounds(op):
    for dtype in kernels.BOUNDS:
        assert faults(op, {op: OWN[op]}, dtype) == []


@pytest.mark.parametrize("op", OWN)
def test_a_part_in_a_thousand_is_found_in_each_operation(op):
    def wrong(*arguments, **named):
        made = OWN[op](*arguments, **named)
        return tuple(each * 1.001 for each in made) if isinstance(made, tuple) else made * 1.001

    leaves, outputs = kernels.ARGUMENTS[op]()[1], 2 if op in ("add_rms_norm", "rope") else 1
    evaluated = outputs if leaves else 0
    found = faults(op, {op: wrong})
    assert len(found) == outputs + len(leaves) + evaluated, found
    assert sum("in evaluation" in line for line in found) == outputs


def test_torchs_products_of_groups_are_what_the_kit_expects():
    for dtype in kernels.BOUNDS:
        assert faults("grouped_matmul", {"grouped_matmul": torch.nn.functional.grouped_mm}, dtype) == []


def test_everything_that_a_kernel_replaces_is_tried():
    def off(*arguments):
        normed, summed = ops.add_rms_norm(*arguments)
        return normed, summed * 1.001

    found = faults("rms_norm", {"rms_norm": ops.rms_norm, "add_rms_norm": off})
    assert found and all(line.startswith("add_rms_norm by mine") for line in found)
    assert faults("swiglu", {"rms_norm": ops.rms_norm}) == ["swiglu by mine replaces rms_norm, and not swiglu"]
    assert faults("linear_cross_entropy", {}) == [], "the form that changes nothing"


class Over(torch.autograd.Function):
    """Right, but for what it leaves of the gradient that it is given."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return ops.swiglu(gate, up)

    @staticmethod
    def backward(ctx, upstream):
        gate, up = (each.detach().requires_grad_() for each in ctx.saved_tensors)
        with torch.enable_grad():
            made = torch.autograd.grad(ops.swiglu(gate, up), (gate, up), upstream)
        upstream.zero_()
        return made


def test_what_is_written_over_is_found():
    def spoils(gate, up):
        made = ops.swiglu(gate, up)
        gate.data.add_(1.0)
        return made

    (said,) = faults("swiglu", {"swiglu": Over.apply})
    assert said.endswith("writes over the gradient of a result")
    assert any(line.endswith("writes over an argument") for line in faults("swiglu", {"swiglu": spoils}))


def test_another_dtype_is_found_unless_it_is_a_sum_that_may_be_wider():
    found = faults("swiglu", {"swiglu": lambda gate, up: ops.swiglu(gate, up).double()})
    assert len(found) == 2 and all("is torch.float64, and should be torch.float32" in line for line in found)
    assert faults("grad_norm", {"grad_norm": lambda lists: OWN["grad_norm"](lists).double()}) == []
    narrow = faults("grad_norm", {"grad_norm": lambda lists: OWN["grad_norm"](lists).bfloat16()})
    assert any("is torch.bfloat16, and should be torch.float32" in line for line in narrow)


def test_what_is_wrong_in_evaluation_alone_is_found():
    def call(gate, up):
        return ops.swiglu(gate, up) * (1.0 if torch.is_grad_enabled() else 2.0)

    (said,) = faults("swiglu", {"swiglu": call})
    assert "result 0 in evaluation" in said


def test_an_operation_of_ones_own_needs_what_it_is_compared_with():
    entries = {"others.twice": lambda hidden: hidden * 2.001}
    with pytest.raises(updates.NoReference, match=r"nothing to compare 'others\.twice' with"):
        faults("twice", entries)
    reference = kernels.Reference(lambda: ((torch.randn(3, 5).double(),), (0,)), lambda hidden: hidden + hidden)
    assert len(faults("twice", entries, own={"twice": reference})) == 3
    with pytest.raises(updates.NoReference, match="no installed plugin 'nobody' has a textbook"):
        faults("nobody", {"updates.nobody": lambda *arguments, **named: None})


def adamw(parameters, gradients, means, squares, step, *, lr, betas, eps, weight_decay, scale, spoil=""):
    """As the paper has it, in plain torch; ``spoil`` is left out."""
    step = 1 if spoil == "step" else step
    for parameter, gradient, mean, square in zip(parameters, gradients, means, squares, strict=True):
        scaled = gradient if scale is None or spoil == "scale" else gradient * scale
        mean.lerp_(scaled, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(scaled, scaled, value=1 - betas[1])
        root = (square / (1 - betas[1] ** step)).sqrt() + eps
        parameter.mul_(1 - lr * (0.0 if spoil == "decay" else weight_decay))
        parameter.sub_(mean / (1 - betas[0] ** step) / root * lr)


def lamb(parameters, gradients, means, squares, step, *, lr, spoil="", **options):
    """The same, and a ratio for what decays."""
    before = [each.clone() for each in parameters]
    adamw(parameters, gradients, means, squares, step, lr=1.0, **options)
    for parameter, old in zip(parameters, before, strict=True):
        direction = old - parameter
        adapts = options["weight_decay"] and old.numel() and spoil != "ratio"
        ratio = old.norm() / direction.norm() if adapts else 1.0
        parameter.copy_(old - lr * ratio * direction)


STEPS = {"adamw": (adamw, ("scale", "step", "decay")), "lamb": (lamb, ("ratio",))}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_an_optimizer_is_compared_with_its_textbook(name):
    right, spoils = STEPS[name]
    for spoil in ("", *spoils):
        entries = {f"updates.{name}": functools.partial(right, spoil=spoil)}
        found = faults(name, entries)
        assert bool(found) == bool(spoil), (spoil, found)
        assert all(line.startswith(f"{name} by mine, weight_decay") for line in found)
        assert faults(name, entries, torch.bfloat16) == [], "steps are of masters, which are fp32"
