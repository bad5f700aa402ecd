"""The phases of a build: what each may change, and that owners replace the core's own way."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from camshaft.build import _check_layouts, layouts
from camshaft.claims import Plan
from camshaft.distributed import Environment
from camshaft.errors import PluginError
from camshaft.loop import session
from camshaft.models.config import ModelConfig
from camshaft.models.init import materialize
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks

SETTINGS = {"sgd": {"lr": 0.1}, "clip": {"max_norm": 1.0}, "precision": {"compute": "fp64"}}


def built(make_recipe, *observers, seed=3):
    """The state of a run that is built and not trained."""
    resolved = make_recipe(SETTINGS, training={"max_steps": 1, "log_every": 1}, seed=seed)
    named = {f"observer{index}": observer for index, observer in enumerate(observers)}
    with session(resolved, Environment(), RunDirectory(resolved.recipe.run.dir), named) as trainer:
        return trainer.state


class Widens(Plugin):
    @hookimpl
    def rewrite(self, config):
        return replace(config, intermediate_size=config.intermediate_size + 4)


class Looks(Plugin):
    """Leaves the architecture as it is, and keeps what it saw."""

    @hookimpl
    def rewrite(self, config):
        self.seen = config.intermediate_size


def test_rewrites_follow_one_another_and_none_leaves_the_architecture(make_recipe):
    looks = Looks()
    state = built(make_recipe, Widens(), looks, Widens())
    assert isinstance(state.config, ModelConfig)
    assert looks.seen == 37 + 4 and state.config.intermediate_size == 37 + 8
    assert state.model.model.layers[0].mlp.up_proj.weight.shape == (45, 20)


class KeepsTwoLayers(Plugin):
    @hookimpl
    def split(self, model):
        assert next(model.parameters()).is_meta
        model.model.layers = model.model.layers[:2]
        return model


def test_split_may_take_parameters_away(make_recipe):
    state = built(make_recipe, KeepsTwoLayers())
    assert not any("layers.2." in name for name in state.world.roles)
    assert {name for name, _ in state.model.named_parameters()} == set(state.world.roles)
    optimized = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in state.model.parameters()}


class Ones(Plugin):
    @hookimpl
    def materialize(self, world, model):
        materialize(model, seed=0, device=world.device, dtype=world.policy.param)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)


def test_an_owner_of_materialize_replaces_the_cores_values(make_recipe):
    assert all(bool((p == 1.0).all()) for p in built(make_recipe, Ones()).model.parameters())


def test_first_values_depend_on_the_recipes_seed_and_have_the_policys_dtype(make_recipe):
    one, same, other = (built(make_recipe, seed=seed).model.lm_head.weight for seed in (3, 3, 4))
    assert one.dtype == torch.float64 and torch.equal(one, same) and not torch.equal(one, other)


class StartsInEval(Plugin):
    @hookimpl
    def build_model(self, config):
        return Llama(config).eval()


class Freezes(Plugin):
    @hookimpl
    def compile_model(self, model):
        model.model.norm.weight.requires_grad_(False)


def test_a_model_trains_in_training_mode(make_recipe):
    assert built(make_recipe, StartsInEval()).model.training


def test_a_phase_may_not_freeze_what_it_did_not_claim(make_recipe):
    with pytest.raises(PluginError, match=r"hook 'compile_model': laid out 'model\.norm\.weight' anew"):
        built(make_recipe, Freezes())


def moved_to_another_axis(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh["tp"], [Shard(0)]))
    before = layouts(model)
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 4), mesh["dp"], [Shard(0)]))
    with pytest.raises(PluginError, match=r"laid out 'weight' anew .*'tp'.*'dp'"):
        _check_layouts("p", "shard_storage", before, layouts(model), Plan())
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh["tp"], [Shard(0)]))
    _check_layouts("p", "shard_storage", before, layouts(model), Plan())
    return True


def test_the_same_placement_on_another_axis_is_another_layout():
    assert run_ranks(2, moved_to_another_axis) == [True, True]
