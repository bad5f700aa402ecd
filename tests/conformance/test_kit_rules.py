"""What of the standard may be changed, and what the kit's own parts see."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from camshaft import ops
from camshaft.ops import Kernel
from camshaft.testing import Conformance
from camshaft.testing.conformance import kernels, leftovers

WHY = "its own sums are rounded to bf16"


def subclass(**attributes):
    return type("TestIt", (Conformance,), {"plugin": "jsonl", **attributes})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"kind": "tracker"}, "kind is 'tracker'; there are: observer"),
        ({"test_leaves_nothing_behind": lambda self: None}, "changes 'test_leaves_nothing_behind' of the standard"),
        ({"bounds": {"loss": 1.0}}, "changes 'bounds' of the standard: say why"),
        ({"ranks": (1,)}, "changes 'ranks'"),
        ({"except_for": {"test_typo": WHY}}, "names 'test_typo'"),
        ({"except_for": {"bounds": ""}}, "must be a reason in words"),
        ({"except_for": {"bounds": "no"}}, "must be a reason in words"),
    ],
)
def test_nothing_is_changed_without_a_reason(attributes, message):
    with pytest.raises(TypeError, match=message):
        subclass(**attributes)


def test_with_a_reason_a_test_is_replaced_or_left_out():
    def own(self):
        """In place of the standard."""

    replaced = subclass(test_leaves_nothing_behind=own, except_for={"test_leaves_nothing_behind": WHY})
    assert replaced.test_leaves_nothing_behind is own
    left_out = subclass(except_for={"test_leaves_nothing_behind": WHY})
    with pytest.raises(pytest.skip.Exception, match=WHY):
        left_out().test_leaves_nothing_behind()
    assert subclass(bounds={"loss": 1.0}, except_for={"bounds": WHY})().limits == {"loss": 1.0}


@pytest.mark.parametrize(
    ("kind", "name", "there"),
    [
        ("observer", "test_frozen_and_unused_parameters", False),
        ("reducer", "test_frozen_and_unused_parameters", True),
        ("reducer", "test_kernels_match_fp64", False),
        ("kernel", "test_kernels_match_fp64", True),
        ("schedule", "test_the_schedule_is_sound_for_every_size", True),
    ],
)
def test_the_kind_decides_which_tests_there_are(kind, name, there):
    assert (getattr(subclass(kind=kind), name) is not None) is there


def test_sizes_follow_the_degrees():
    assert subclass().sizes() == [1, 2, 4]
    assert subclass(recipe={"parallel": {"tensor_parallel": 2}}).sizes() == [2, 4]
    assert subclass(recipe={"parallel": {"tensor_parallel": 2, "pipeline_parallel": 2}}).sizes() == [4]


def nothing(*arguments, **named):
    """A hook."""


MODULE = {
    "forward_hooks": lambda module: module.register_forward_hook(nothing),
    "forward_pre_hooks": lambda module: module.register_forward_pre_hook(nothing),
    "backward_hooks": lambda module: module.register_full_backward_hook(nothing),
    "backward_pre_hooks": lambda module: module.register_full_backward_pre_hook(nothing),
    "state_dict_hooks": lambda module: module.register_state_dict_post_hook(nothing),
    "state_dict_pre_hooks": lambda module: module.register_state_dict_pre_hook(nothing),
    "load_state_dict_pre_hooks": lambda module: module.register_load_state_dict_pre_hook(nothing),
    "load_state_dict_post_hooks": lambda module: module.register_load_state_dict_post_hook(nothing),
}


@pytest.mark.parametrize("name", MODULE)
def test_a_hook_on_a_module_is_seen_until_it_is_removed(name):
    model = nn.Sequential(nn.Linear(2, 2))
    handle = MODULE[name](model[0])
    assert leftovers.left(model) == [f"{name} on module '0'"]
    handle.remove()
    assert leftovers.left(model) == []


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_tensor_is_seen_until_it_is_removed(register):
    model, part = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    for tensor, label in ((model.weight, "parameter 'weight'"), (part, "part 0")):
        handle = getattr(tensor, register)(nothing)
        assert [line.partition(" on ")[2] for line in leftovers.left(model, [part])] == [label]
        handle.remove()
        assert leftovers.left(model, [part]) == []


def test_optimizers_forwards_and_threads_are_seen():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    handles = [optimizer.register_step_pre_hook(nothing), optimizer.register_step_post_hook(nothing)]
    assert len(leftovers.left(model, (), optimizer)) == 2
    [handle.remove() for handle in handles]
    assert leftovers.left(model, (), optimizer) == []
    model.forward = nothing
    assert leftovers.left(model) == ["module '' has a forward of its own"]
    handle = nn.modules.module.register_module_forward_hook(nothing)
    assert len(leftovers.left(model)) == 2
    handle.remove()
    before, stop = threading.enumerate(), threading.Event()
    thread = threading.Thread(target=stop.wait, name="late")
    thread.start()
    assert leftovers.threads_beside(before) == ["thread 'late'"]
    stop.set()
    thread.join()
    assert leftovers.threads_beside(before) == []


OWN = {name: getattr(ops.Ops(), name) or kernels.EAGER[name] for name in kernels.ARGUMENTS}


@pytest.mark.parametrize("op", OWN)
def test_torchs_own_form_of_each_operation_is_within_the_bounds(op):
    kernel = Kernel(op, "torch", lambda: {op: OWN[op]})
    for dtype in kernels.BOUNDS:
        assert kernels.faults(kernel, None, dtype, "cpu") == []


@pytest.mark.parametrize("op", OWN)
def test_a_part_in_a_thousand_is_found_in_each_operation(op):
    def wrong(*arguments):
        made = OWN[op](*arguments)
        return tuple(each * 1.001 for each in made) if isinstance(made, tuple) else made * 1.001

    found = kernels.faults(Kernel(op, "off", lambda: {op: wrong}), None, torch.float32, "cpu")
    leaves = kernels.ARGUMENTS[op]()[1]
    outputs = 2 if op in ("add_rms_norm", "rope") else 1
    assert len(found) == outputs + len(leaves), found
