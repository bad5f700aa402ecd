"""Rules of Lion, LAMB and Muon one by one: torch's own Muon as the oracle, who gets which update, what is refused."""

from types import SimpleNamespace

import flat_shards
import pytest
import textbook
import torch
from torch import nn
from torch.nn import Parameter

from camshaft.comm import Channel
from camshaft.errors import RecipeError
from camshaft.masters import whole_parts
from camshaft.ops import Ops
from camshaft.parts import Part, Parts, Piece
from camshaft.recipe import check
from camshaft.testing.ranks import run_ranks
from camshaft_adafactor import Options as AdafactorOptions
from camshaft_adafactor import Plugin as Adafactor
from camshaft_adamw import Options as AdamWOptions
from camshaft_adamw import Plugin as AdamW
from camshaft_lamb import Options as LambOptions
from camshaft_lamb import Plugin as Lamb
from camshaft_lion import Options as LionOptions
from camshaft_lion import Plugin as Lion
from camshaft_muon import Options as MuonOptions
from camshaft_muon import Plugin as Muon
from camshaft_muon.newton_schulz import cost, orthogonalize
from camshaft_muon.optimizer import iteration_dtype
from camshaft_sgd import Options as SGDOptions
from camshaft_sgd import Plugin as SGD

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)
        self.experts = nn.Parameter(torch.randn(2, 6, 6))
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.to(dtype)


ROLES = {"embed.weight": "embedding", "up.weight": "matrix", "up.bias": "bias", "down.weight": "matrix"}
ROLES |= {"experts": "matrix", "norm.weight": "norm", "norm.bias": "bias", "lm_head.weight": "matrix"}


def world(model, parts=None):
    policy = SimpleNamespace(master=next(model.parameters()).dtype)
    chosen = whole_parts(model, ROLES) if parts is None else parts
    mesh = SimpleNamespace(degree=lambda axis: 1)
    return SimpleNamespace(parts=chosen, policy=policy, device=CPU, roles=ROLES, mesh=mesh, ops=Ops())


def build(plugin, model, parts=None):
    plugin.name = type(plugin).__module__.removeprefix("camshaft_")
    return plugin.optimizer(world(model, parts), model)


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def names(model, tensors):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {known[id(tensor)] for tensor in tensors}


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_muon(scaling, nesterov):
    ours, theirs = Small(), Small()
    options = MuonOptions(lr=0.02, momentum=0.9, nesterov=nesterov, scaling=scaling, iteration_dtype="bf16")
    one = build(Muon(options), ours)
    hidden = [theirs.up.weight, theirs.down.weight]
    other = torch.optim.Muon(
        hidden, lr=0.02, momentum=0.9, nesterov=nesterov, adjust_lr_fn=scaling, weight_decay=0.1, ns_steps=5
    )
    for step in range(20):
        gradients(ours, step)
        gradients(theirs, step)
        one.step()
        other.step()
    for mine, wanted in ((ours.up, theirs.up), (ours.down, theirs.down)):
        # Same bf16 products in the same order; the factor meets the rate before or after the matrix.
        assert torch.allclose(mine.weight, wanted.weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(one.state[mine.weight]["momentum_buffer"], other.state[wanted.weight]["momentum_buffer"])


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = Small()
    optimizer = build(Muon(MuonOptions(lr=0.02)), model)
    hidden, decaying, plain = [names(model, group["params"]) for group in optimizer.param_groups]
    assert hidden == {"up.weight", "down.weight"}, "an output head and a stack of matrices are none"
    assert decaying == {"embed.weight", "experts", "lm_head.weight"}
    assert plain == {"up.bias", "norm.weight", "norm.bias"}
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert rates == [(0.02, 0.1), (3e-4, 0.1), (3e-4, 0.0)]


def test_muons_adamw_is_torchs():
    ours, theirs = Small(), Small()
    options = {"lr": 2e-3, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2}
    one = build(Muon(MuonOptions.model_validate({"lr": 0.02, "adamw": options})), ours)
    rest = [theirs.embed.weight, theirs.experts, theirs.lm_head.weight]
    vectors = [theirs.up.bias, theirs.norm.weight, theirs.norm.bias]
    groups = [{"params": rest, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}]
    other = torch.optim.AdamW(groups, lr=2e-3, betas=(0.8, 0.9), eps=1e-6, fused=True)
    for step in range(20):
        gradients(ours, step)
        gradients(theirs, step)
        for group in (*one.param_groups, *other.param_groups):
            group["lr"] *= 0.9  # as a schedule does
        one.step()
        other.step()
    for name in ("embed.weight", "experts", "lm_head.weight", "up.bias", "norm.weight", "norm.bias"):
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name


def test_patterns_exclude_matrices_and_idle_ones_are_refused():
    model = Small()
    optimizer = build(Muon(MuonOptions(lr=0.02, exclude=["up.*", "lm_head*"])), model)
    assert names(model, optimizer.param_groups[0]["params"]) == {"down.weight"}
    with pytest.raises(RecipeError, match=r"plugins\.muon\.exclude\.0: 'uq\.\*' matches no parameter of the model"):
        build(Muon(MuonOptions(lr=0.02, exclude=["uq.*"])), model)
    with pytest.raises(RecipeError, match="no hidden matrix is left that trains"):
        build(Muon(MuonOptions(lr=0.02, exclude=["*"])), model)


def flat_matrices(model):
    """All matrices side by side in one flat part, as an owner of storage would lay them out."""
    pieces, place, values = [], 0, []
    for name in ("lm_head.weight", "up.weight", "experts", "down.weight"):
        parameter = model.get_parameter(name)
        pieces.append(Piece(name, tuple(parameter.shape), 0, place, parameter.numel()))
        values.append(parameter.detach().reshape(-1))
        place += parameter.numel()
    return Parts([Part(Parameter(torch.cat(values)), "matrix", tuple(pieces))])


def test_a_part_that_holds_other_matrices_too_is_split_first():
    model, flat = Small(torch.float64), Small(torch.float64)
    parts = flat_matrices(flat)
    storage = parts.tensors[0].data.clone()
    whole, divided = build(Muon(MuonOptions(lr=0.02)), model), build(Muon(MuonOptions(lr=0.02)), flat, parts)
    assert [[piece.name for piece in part.pieces] for part in parts] == [
        ["lm_head.weight"],
        ["up.weight"],
        ["experts"],
        ["down.weight"],
    ]
    for step in range(3):
        gradients(model, step)
        for part in parts:
            part.tensor.grad = model.get_parameter(part.pieces[0].name).grad.reshape(-1).clone()
        whole.step()
        divided.step()
    for part in parts:
        assert torch.equal(part.tensor.view(part.pieces[0].shape), model.get_parameter(part.pieces[0].name))
    assert not torch.equal(torch.cat([part.tensor.data for part in parts]), storage)


def test_newton_schulz_moves_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((20, 7), (7, 20), (9, 9)):
        matrix = torch.randn(shape, dtype=torch.float64)
        result = orthogonalize(matrix, 5)
        values = torch.linalg.svdvals(result)
        assert result.shape == matrix.shape and float(values.min()) > 0.6 and float(values.max()) < 1.3
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert float(torch.nn.functional.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0)) > 0.97
        assert torch.allclose(result, textbook.newton_schulz(matrix, 5), rtol=1e-12, atol=1e-12)
    assert not orthogonalize(torch.zeros(4, 3), 5).any()
    assert cost((20, 7)) == cost((7, 20)) == 49 * 47


@pytest.mark.parametrize(
    ("wanted", "master", "expected"),
    [
        ("auto", torch.float64, torch.float64),
        ("auto", torch.float32, torch.float32),
        ("auto", torch.bfloat16, torch.float32),
        ("bf16", torch.float64, torch.bfloat16),
        ("fp64", torch.float32, torch.float64),
    ],
)
def test_dtype_of_the_iterations_on_a_cpu(wanted, master, expected):
    assert iteration_dtype(wanted, master, CPU) == expected


def test_a_trust_ratio_is_one_without_weights_or_update_and_bounded():
    model = Small(torch.float64)
    with torch.no_grad():
        model.up.weight.zero_()
        model.down.weight.mul_(1e4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = build(Lamb(LambOptions(lr=0.1, weight_decay=0.0, max_ratio=3.0)), model)
    gradients(model, 0)
    model.lm_head.weight.grad = None
    model.experts.grad.zero_()
    optimizer.step()
    # Adam's first step is the gradient's sign, but for eps.
    signs = {name: p.grad.sign() for name, p in model.named_parameters() if p.grad is not None}
    moved = {name: (before[name] - p.detach()) / 0.1 for name, p in model.named_parameters()}
    assert torch.allclose(moved["up.weight"], signs["up.weight"], atol=1e-3), "zero weights: ratio 1"
    assert torch.allclose(moved["down.weight"], 3 * signs["down.weight"], atol=1e-2), "at the limit"
    assert torch.allclose(moved["up.bias"], signs["up.bias"], atol=1e-3), "exempt"
    assert not moved["experts"].any() and not moved["lm_head.weight"].any()
    assert model.lm_head.weight not in optimizer.state and float(optimizer.state[model.up.weight]["step"]) == 1


def test_vectors_may_have_a_trust_ratio_too():
    model = Small(torch.float64)
    with torch.no_grad():
        model.norm.weight.fill_(0.5)
    optimizer = build(Lamb(LambOptions(lr=0.1, exempt_vectors=False)), model)
    gradients(model, 0)
    optimizer.step()
    moved = (0.5 - model.norm.weight.detach()) / 0.1
    assert torch.allclose(moved, 0.5 * model.norm.weight.grad.sign(), atol=1e-3), "ratio is |w| / |u| = 0.5"


PLUGINS = {
    "adafactor": Adafactor(AdafactorOptions(lr=0.01)),
    "adamw": AdamW(AdamWOptions(lr=0.01)),
    "sgd": SGD(SGDOptions(lr=0.01, momentum=0.9)),
    "lion": Lion(LionOptions(lr=0.01)),
    "lamb": Lamb(LambOptions(lr=0.01)),
    "muon": Muon(MuonOptions(lr=0.01)),
}


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("zeros", [True, False], ids=["gradients-of-no-element", "no-gradient"])
def test_empty_parts_and_parts_without_gradient(name, zeros):
    """A rank may hold nothing of a role, and whole roles may have no gradient; state stays as short as the tensors."""
    model = Small()
    parts = [Part(Parameter(torch.empty(0)), role, ()) for role in ("matrix", "embedding", "norm")]
    parts += [Part(Parameter(torch.zeros(3)), "bias", ())]  # padding only
    parts += whole_parts(model, ROLES)
    optimizer = build(PLUGINS[name], model, Parts(parts))
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    for step in range(3):
        gradients(model, step)
        model.down.weight.grad = None
        for part in parts[:4]:
            part.tensor.grad = torch.zeros_like(part.tensor) if zeros else None
        optimizer.step()
    for key, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all()
        assert torch.equal(parameter, before[key]) == (key == "down.weight"), key
    assert not parts[3].tensor.detach().any(), "padding stays 0"
    for tensor, state in optimizer.state.items():
        for key, value in state.items():
            assert value is None or isinstance(value, (int, float)) or value.shape in (tensor.shape, ()), key


def everything_on_rank_0(rank, size, name):
    """Steps of rank 0, which holds all pieces, beside ranks that hold none."""
    model, alone = Small(), Small()
    parts = [Part(Parameter(torch.empty(0)), role, ()) for role in ("matrix", "norm")]
    channel = Channel(torch.distributed.group.WORLD, name, "dp")
    optimizer = build(PLUGINS[name], model, Parts(whole_parts(model, ROLES) if rank == 0 else parts, channel))
    reference = build(PLUGINS[name], alone)
    for step in range(3):
        if rank == 0:
            gradients(model, step)
        elif step:
            for part in parts:
                part.tensor.grad = torch.zeros_like(part.tensor)
        gradients(alone, step)
        optimizer.step()
        reference.step()
    return rank > 0 or all(torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize("name", PLUGINS)
def test_a_rank_with_nothing_at_all_takes_its_step(name):
    assert all(run_ranks(2, everything_on_rank_0, name))


NEEDS = [("muon", "whole_parameters"), ("lamb", "parameter_sums"), ("adafactor", "parameter_sums")]


@pytest.mark.parametrize(("optimizer", "fact"), NEEDS)
def test_storage_that_does_not_give_it_is_named(make_recipe, monkeypatch, optimizer, fact):
    flat_shards.install(monkeypatch)
    enough = {"flat_shards": {"gives": [fact]}, optimizer: {"lr": 0.01}}
    assert check(make_recipe(enough, 2), 2).problems == ()
    (problem,) = check(make_recipe({**enough, "flat_shards": {"gives": []}}, 2), 2).problems
    assert f"'{optimizer}' needs '{fact}', which 'flat_shards'" in problem.message
    assert problem.key == f"plugins.{optimizer}" and "flat_shards" in problem.fix
    for alone in ({"lion": {"lr": 0.01}}, {"adafactor": {"lr": 0.01, "clip_threshold": None}}):
        assert check(make_recipe({**alone, "flat_shards": {"gives": []}}, 2), 2).problems == ()


def test_adafactor_without_sizes_asks_for_no_sums():
    model = Small(torch.float64)
    before = model.up.weight.detach().clone()
    optimizer = build(Adafactor(AdafactorOptions(lr=0.1, clip_threshold=None)), model)
    gradients(model, 0)
    optimizer.step()
    # In the first step the second moment is the square, so that each element moves by the rate.
    assert torch.allclose(before - model.up.weight, 0.1 * model.up.weight.grad.sign(), rtol=1e-12, atol=1e-12)
