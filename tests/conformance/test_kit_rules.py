"""What of the standard may be changed, and what the kit's own parts see."""

from __future__ import annotations

import multiprocessing
import os
import struct
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from camshaft.testing import Conformance, ranks
from camshaft.testing.conformance import leftovers, rules, touched
from camshaft.testing.conformance.trial import Trial, write_corpus

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
        ({"test_equals_the_reference": None}, "changes 'test_equals_the_reference' of the standard"),
        ({"check_parity": lambda self, trial, resolved, ranks: None}, "changes 'check_parity'"),
        ({"limits": {"loss": 1.0}}, "changes 'limits'"),
        ({"sizes": classmethod(lambda cls: [1])}, "changes 'sizes'"),
        ({"neighbours": lambda self: []}, "changes 'neighbours'"),
        ({"several": classmethod(lambda cls: 1)}, "changes 'several'"),
        ({"_options": lambda self: None}, "changes '_options'"),
        ({"max_norm": None}, "changes 'max_norm'"),
        ({"kind": "schedule", "microbatches": ()}, "changes 'microbatches'"),
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


def test_a_subclass_of_another_kind_has_the_tests_of_its_own_kind():
    parent = subclass()
    assert parent.test_frozen_and_unused_parameters is None
    child = type("TestChild", (parent,), {"kind": "reducer"})
    assert child.test_frozen_and_unused_parameters is Conformance.test_frozen_and_unused_parameters


def test_two_classes_of_one_name_have_references_of_their_own(monkeypatch):
    from camshaft.testing.conformance import plain
    from camshaft.testing.conformance.trial import STEPS

    monkeypatch.setattr(plain, "records", lambda *arguments, factor, **more: [factor(0, STEPS)] * STEPS)
    trial = SimpleNamespace(alone=lambda resolved: resolved)
    resolved = SimpleNamespace(tree={"name": "two classes of one name"})
    for module, rate in (("one", 1.0), ("two", 2.0)):
        made = subclass(__module__=module, reference_lr=lambda self, step, total, rate=rate: rate)
        assert made().reference(trial, resolved) == [rate] * STEPS


def test_a_rank_that_dies_in_the_middle_of_its_report_is_told():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    os.write(sender.fileno(), struct.pack("!i", 100) + b"half of it")
    sender.close()
    with pytest.raises(ranks.RankFailed, match="rank 0: died without a report"):
        ranks._collect([receiver], ranks.Clock([]), 5.0)


def test_a_number_over_nan_is_seen():
    nan, one = torch.tensor([float("nan"), 1.0]), torch.tensor([2.0, 1.0])
    assert touched._same(nan, nan.clone()) and not touched._same(nan, one) and not touched._same(one, nan)
    assert not touched._same(one, one[:1]) and not touched._same(one, one.double())


def test_every_number_of_ranks_is_tried():
    """One that the standard does not know too, and none at all is refused."""
    tried = []
    asked = SimpleNamespace(
        fixturenames=["size", "accumulation"], parametrize=lambda names, values: tried.extend(values)
    )
    subclass(ranks=(3, 2, 5), except_for={"ranks": WHY})().pytest_generate_tests(asked)
    assert tried == [(3, 3), (2, 1), (5, 3)]
    with pytest.raises(ValueError, match=r"make 3 ranks, of which none of ranks = \(1, 2, 4\) is a multiple"):
        subclass(recipe={"parallel": {"data_parallel_shard": 3}}).sizes()
    with pytest.raises(pytest.skip.Exception, match=f"needs several ranks: {WHY}"):
        subclass(ranks=(1,), except_for={"ranks": WHY}).several()


def test_clipping_is_active_in_every_step_of_the_reference(tmp_path):
    """And each step has another norm: a kit whose limit is never reached would pass a plugin that does not clip."""
    trial = Trial({"plugins": {"jsonl": {}}}, write_corpus(tmp_path), tmp_path / "trial")
    records = subclass()().reference(trial, trial.resolve(1))
    assert len({record.norm for record in records}) == len(records) == 4
    assert all(record.norm > 2 * Conformance.max_norm for record in records)


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
    before, stop = threading.enumerate(), threading.Event()
    thread = threading.Thread(target=stop.wait, name="late")
    thread.start()
    assert leftovers.threads_beside(before) == ["thread 'late'"]
    stop.set()
    thread.join()
    assert leftovers.threads_beside(before) == []


EVERYWHERE = {
    "forward hooks": nn.modules.module.register_module_forward_hook,
    "forward pre hooks": nn.modules.module.register_module_forward_pre_hook,
    "backward hooks": nn.modules.module.register_module_full_backward_hook,
    "buffer registration hooks": nn.modules.module.register_module_buffer_registration_hook,
    "module registration hooks": nn.modules.module.register_module_module_registration_hook,
    "parameter registration hooks": nn.modules.module.register_module_parameter_registration_hook,
    "optimizer pre hooks": register_optimizer_step_pre_hook,
    "optimizer post hooks": register_optimizer_step_post_hook,
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_hook_on_everything_is_seen_until_it_is_removed(name):
    before = leftovers.everywhere()
    handle = EVERYWHERE[name](nothing)
    (line,) = leftovers.everywhere() - before
    assert line.startswith(f"global_{name.replace(' ', '_')} on every ")
    handle.remove()
    assert leftovers.everywhere() == before


def test_modes_of_the_process_and_classes_of_modules_are_seen():
    before = leftovers.everywhere()
    for mode, line in ((torch.no_grad(), "gradients: False"), (torch.autocast("cpu"), "autocast on the CPU: True")):
        with mode:
            assert leftovers.everywhere() - before == {line}
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,), name="stays")
    process.start()
    assert leftovers.everywhere() - before == {"process 'stays'"}
    process.kill()
    process.join()
    assert leftovers.everywhere() == before
    model, fresh = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    assert leftovers.changed(model, fresh) == []
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert leftovers.changed(model, fresh) == ["module '0' is a ParametrizedLinear, and was a Linear"]


@pytest.mark.parametrize(
    ("hooks", "resources", "said"),
    [
        ({"kernels", "bind"}, set(), ["it implements kernels, as kind 'kernel' does"]),
        ({"optimizer"}, {"gradient.reduce"}, ["it implements optimizer, as kind", "it claims gradient.reduce, as"]),
        ({"rewrite"}, {"module.implementation"}, []),
    ],
)
def test_an_observer_is_one(hooks, resources, said):
    found = rules.more_than("observer", hooks, resources)
    assert len(found) == len(said) and all(map(str.startswith, found, said))
    assert rules.more_than("sharder", hooks, resources) == []
