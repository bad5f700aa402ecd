"""Claims: what collides, what does not, and what every conflict says."""

import pytest

from camshaft.claims import Claim, Plan, check, overlap
from camshaft.errors import PluginError, Problem
from camshaft.mesh import MeshShape
from camshaft.recipe.schema import Parallel


def mesh(world_size=1, **degrees):
    return MeshShape.of(Parallel(**degrees), world_size)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("*", "anything", True),
        ("model.layers.*", "model.layers.3.mlp", True),
        ("model.layers.*", "model.norm", False),
        ("*.mlp", "*.self_attn", False),
        ("*.mlp.*", "model.*", True),
        ("a", "a", True),
        ("a", "b", False),
        ("model.layers.1.*", "model.layers.2.*", False),
        ("model.layers.[0-3].*", "model.layers.2.mlp", True),
    ],
)
def test_overlap(left, right, expected):
    assert overlap(left, right) is expected
    assert overlap(right, left) is expected


def test_same_resource_and_axis_collide_and_both_plugins_are_named():
    plans = {
        "one": Plan(claims=(Claim("gradient.reduce", "dp"),)),
        "two": Plan(claims=(Claim("gradient.reduce", "dp", "model.*"),)),
    }
    (problem,) = check(plans, mesh(2))
    assert "'one' and 'two' both claim gradient.reduce@dp" in problem.message
    assert problem.key == "plugins.two" and "plugins.two=null" in problem.fix


def test_other_axes_resources_and_targets_do_not_collide():
    plans = {
        "storage": Plan(claims=(Claim("parameter.layout", "dp"), Claim("gradient.reduce", "dp"))),
        "tensor": Plan(claims=(Claim("parameter.layout", "tp"),)),
        "mlp": Plan(claims=(Claim("module.recompute", target="*.mlp"),)),
        "attention": Plan(claims=(Claim("module.recompute", target="*.self_attn"),)),
    }
    assert check(plans, mesh(4, tensor_parallel=2)) == []


def test_one_plugin_may_claim_names_that_overlap():
    claims = (Claim("parameter.layout", "tp", "*.q_proj.*"), Claim("parameter.layout", "tp", "*.k_proj.*"))
    assert check({"tensor": Plan(claims=claims)}, mesh(2, tensor_parallel=2)) == []
    other = Plan(claims=(Claim("parameter.layout", "tp", "model.layers.0.self_attn.q_proj.weight"),))
    (problem,) = check({"tensor": Plan(claims=claims), "other": other}, mesh(2, tensor_parallel=2))
    assert "'tensor' and 'other' both claim" in problem.message


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (Claim("gradients.reduce", "dp"), "claims 'gradients.reduce', which is no resource; .*gradient.reduce"),
        (Claim("gradient.reduce", "data"), "claims gradient.reduce@data on an axis .*there are: pp, dp, cp, tp"),
    ],
)
def test_a_claim_on_what_does_not_exist_is_the_plugins_fault(claim, words):
    with pytest.raises(PluginError, match=f"plugin 'typo', hook 'plan': {words}"):
        check({"typo": Plan(claims=(claim,))}, mesh())


def test_a_claim_on_a_divided_axis_is_a_claim_on_both_halves():
    half = mesh(4, data_parallel_shard=2)
    both = {"sums": Plan(claims=(Claim("gradient.reduce", "dp"),))}
    assert check(both, half) == []
    (problem,) = check({**both, "shards": Plan(claims=(Claim("gradient.reduce", "dp_shard"),))}, half)
    assert "'sums' and 'shards' claim gradient.reduce@dp and gradient.reduce@dp_shard, which overlap" in problem.message
    assert problem.key == "plugins.shards"
    (problem,) = check({**both, "again": both["sums"]}, half)
    assert "'sums' and 'again' both claim gradient.reduce@dp" in problem.message


def test_the_halves_of_an_axis_may_have_different_owners():
    half = mesh(4, data_parallel_shard=2)
    plans = {"shards": Plan(claims=(Claim("gradient.reduce", "dp_shard"),))}
    (problem,) = check(plans, half)
    assert problem.key == "parallel.data_parallel_replicate" and "axis 'dp_replicate' has degree 2" in problem.message
    assert problem.fix.endswith("parallel.data_parallel_replicate=1")
    plans["copies"] = Plan(claims=(Claim("gradient.reduce", "dp_replicate"),))
    assert check(plans, half) == []


def test_a_half_cannot_be_claimed_where_the_axis_is_not_divided():
    with pytest.raises(PluginError, match="on an axis that the mesh lacks; there are: pp, dp, cp, tp"):
        check({"shards": Plan(claims=(Claim("gradient.reduce", "dp_shard"),))}, mesh(4))


def test_the_core_provides_whole_parameters_until_somebody_lays_out_what_is_updated():
    plans = {"matrix": Plan(requires=("whole_parameters", "parameter_sums"))}
    assert check(plans, mesh()) == []
    plans["storage"] = Plan(claims=(Claim("optimizer.layout", "dp"),), provides=("parameter_sums",))
    (problem,) = check(plans, mesh())
    assert "'matrix' needs 'whole_parameters', which 'storage', who lays out" in problem.message
    assert problem.key == "plugins.matrix" and problem.fix.endswith("or remove 'storage'")


def test_an_axis_that_nobody_claims_is_refused():
    (problem,) = check({"adamw": Plan()}, mesh(2))
    assert problem.key == "parallel.data_parallel" and "plugins.ddp: {}" in problem.fix
    (problem,) = check({"adamw": Plan()}, mesh(4, tensor_parallel=4))
    assert problem.key == "parallel.tensor_parallel" and "axis 'tp' has degree 4" in problem.message


def test_an_axis_that_splits_the_batch_needs_its_gradients_reduced():
    plans = {"states": Plan(claims=(Claim("optimizer.layout", "dp"),))}
    (problem,) = check(plans, mesh(2))
    assert "no enabled plugin reduces gradients along it" in problem.message and "plugins.ddp" in problem.fix
    assert problem.fix.endswith("launch.processes=1")
    plans["sums"] = Plan(claims=(Claim("gradient.reduce", "dp"),))
    assert check(plans, mesh(2)) == []


def test_requirements_must_be_provided():
    plans = {"needs": Plan(requires=("elementwise_optimizer",))}
    (problem,) = check(plans, mesh())
    assert "'needs' needs 'elementwise_optimizer'" in problem.message
    (problem,) = check(plans, mesh(), {"clip": [], "optimizer": ["lamb"]})
    assert "'elementwise_optimizer', which 'lamb', who owns the slot 'optimizer', does not provide" in problem.message
    assert problem.key == "plugins.needs" and "in place of 'lamb'" in problem.fix
    plans["gives"] = Plan(provides=("elementwise_optimizer",))
    assert check(plans, mesh()) == []


def test_a_plugins_own_problems_come_first_and_none_is_lost():
    own = Problem("a size that does not divide", key="plugins.one.size")
    plans = {"one": Plan(problems=(own,)), "two": Plan(requires=("nothing",))}
    assert [problem.key for problem in check(plans, mesh(2))] == [own.key, "plugins.two", "parallel.data_parallel"]
