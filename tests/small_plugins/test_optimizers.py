"""Parameter groups: what decays, what does not, what is frozen or tied."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from camshaft.build import roles
from camshaft.errors import RecipeError
from camshaft.masters import whole_parts
from camshaft.models.groups import decay_groups
from camshaft.ops import Ops
from camshaft_adamw import Options as AdamWOptions
from camshaft_adamw import Plugin as AdamW
from camshaft_sgd import Options as SGDOptions
from camshaft_sgd import Plugin as SGD


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


ROLES = {
    "embed.weight": "embedding",
    "linear.weight": "matrix",
    "linear.bias": "bias",
    "norm.weight": "norm",
    "norm.bias": "bias",
}


def names(model, group):
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {known[parameter] for parameter in group["params"]}


def test_matrices_and_embeddings_decay_and_nothing_else_and_ties_count_once():
    model = Small()
    decays, plain = decay_groups(whole_parts(model, ROLES), 0.1)
    assert names(model, decays) == {"embed.weight", "linear.weight"} and decays["weight_decay"] == 0.1
    assert names(model, plain) == {"linear.bias", "norm.weight", "norm.bias"} and plain["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in (decays, plain)) == 5


def test_embeddings_may_be_left_out_and_frozen_parameters_always_are():
    model = Small()
    model.linear.weight.requires_grad_(False)
    (only,) = decay_groups(whole_parts(model, ROLES), 0.1, decay_embeddings=False)
    assert only["weight_decay"] == 0.0 and names(model, only) == set(ROLES) - {"linear.weight"}


def test_a_frozen_model_is_refused():
    with pytest.raises(RecipeError, match="every parameter of the model is frozen"):
        decay_groups(whole_parts(Small().requires_grad_(False), ROLES), 0.1)


def test_roles_of_a_foreign_model_fall_back_to_dimensions():
    found = roles(Small())
    assert found["linear.weight"] == "matrix" and found["linear.bias"] == "bias" and found["norm.weight"] == "norm"


@pytest.mark.parametrize(
    ("plugin", "kind"),
    [
        (AdamW(AdamWOptions(lr=1e-3, betas=[0.8, 0.9], eps=1e-5, weight_decay=0.2)), torch.optim.AdamW),
        (SGD(SGDOptions(lr=1e-3, momentum=0.5, nesterov=True, weight_decay=0.2)), torch.optim.SGD),
    ],
)
def test_options_reach_torch(plugin, kind):
    model = Small()
    optimizer = plugin.optimizer(SimpleNamespace(parts=whole_parts(model, ROLES), ops=Ops()), model)
    assert isinstance(optimizer, kind)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert all(group["lr"] == 1e-3 and group["fused"] for group in optimizer.param_groups)
    if kind is torch.optim.AdamW:
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.9) and optimizer.param_groups[0]["eps"] == 1e-5
    else:
        assert optimizer.param_groups[0]["momentum"] == 0.5 and optimizer.param_groups[0]["nesterov"]


@pytest.mark.parametrize(
    ("decays", "expected"), [(True, {"embed.weight", "linear.weight"}), (False, {"linear.weight"})]
)
def test_adamw_decays_embeddings_only_when_told(decays, expected):
    model = Small()
    plugin = AdamW(AdamWOptions(lr=1e-3, weight_decay=0.2, decay_embeddings=decays))
    optimizer = plugin.optimizer(SimpleNamespace(parts=whole_parts(model, ROLES), ops=Ops()), model)
    assert names(model, optimizer.param_groups[0]) == expected


def test_nesterov_without_momentum_is_refused():
    plugin = SGD(SGDOptions(lr=1.0, nesterov=True))
    plugin.name = "sgd"
    assert plugin.plan().problems[0].key == "plugins.sgd.nesterov"


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_parameter_with_a_late_first_gradient_gets_its_momentum_as_in_torch(nesterov):
    """torch's fused step refuses a group in which some have momentum and some have none."""

    def train(make):
        model = Small()
        torch.nn.init.ones_(model.linear.weight)
        optimizer = make(model)
        for step in range(4):
            for name, parameter in model.named_parameters():
                late = name == "linear.weight" and step < 2
                parameter.grad = None if late else torch.full_like(parameter, 0.5 + step)
            optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def ours(model):
        plugin = SGD(SGDOptions(lr=0.1, momentum=0.9, nesterov=nesterov))
        return plugin.optimizer(SimpleNamespace(parts=whole_parts(model, ROLES), ops=Ops()), model)

    def plain(model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, foreach=False)

    torch.manual_seed(0)
    one = train(ours)
    torch.manual_seed(0)
    other = train(plain)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=0)
