"""Every launch is made on the device of its tensors: what launches is watched, forward and backward."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from triton_cases import DEVICE, randn

TRITON = "interpreted"


class Watched:
    """In the place of a kernel: notes on which tensor's device each launch is, and launches."""

    def __init__(self, kernel, held, launches):
        self.kernel, self.held, self.launches = kernel, held, launches

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            assert self.held, "launched on whatever device is the current one"
            mine = {each.data_ptr() for each in arguments if isinstance(each, torch.Tensor)}
            assert self.held[-1].data_ptr() in mine, "on the device of a tensor that it does not get"
            self.launches.append(self.kernel.__name__)
            return self.kernel[grid](*arguments, **named)

        return launch


def all_operations():
    """Every operation of ours, forward and backward."""
    from camshaft_kernels.triton import adamw, head, loss, norm, rope, swiglu

    rows = randn(4, 16)
    other, weight = randn(4, 16, seed=1), randn(16, seed=2).requires_grad_()
    labels = torch.tensor([1, 0, -100, 3], device=DEVICE)
    heads = randn(1, 4, 2, 8)
    angles = randn(1, 4, 1, 8, seed=4).detach()
    normed, summed = norm.add_rms_norm(rows, other, weight, 1e-5)
    turned = rope.rope(heads, heads * 2, (angles, angles), torch.float32)
    made = [
        norm.rms_norm(rows, weight, 1e-5), normed, summed, swiglu.swiglu(rows, other), *turned,
        loss.cross_entropy(rows, labels), head.linear_cross_entropy(rows, other, labels),
    ]  # fmt: skip
    sum(each.sum() for each in made).backward()
    lists = [[each.detach().clone()] for each in (rows, other, other, other.abs())]
    adamw.adamw(*lists, 1, lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)


def test_every_launch_is_on_its_tensors_device():
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from camshaft_kernels.triton import adamw, head, loss, norm, rope, swiglu

    held, launches, kernels = [], [], 0

    @contextmanager
    def on_device_of(tensor):
        held.append(tensor)
        yield
        held.pop()

    with ExitStack() as stack:
        for module in (adamw, head, loss, norm, rope, swiglu):
            if module is not head:  # whose launches are those of the loss
                stack.enter_context(patch.object(module, "on_device_of", on_device_of))
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel") and isinstance(value, InterpretedFunction | JITFunction):
                    stack.enter_context(patch.object(module, name, Watched(value, held, launches)))
                    kernels += 1
        all_operations()
    assert kernels == 9 and len(set(launches)) == 7, sorted(launches)
    assert [launches.count(f"{name}_kernel") for name in ("forward", "backward", "weight")] == [3, 3, 2]
    assert not held
