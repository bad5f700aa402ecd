"""Masters: what they hold first, what is rounded from them, what backward makes, and what a step leaves alone."""

import pytest
import torch
from precision_cases import VARIED, Variant, plugins
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.masters import Masters
from camshaft.models.init import materialize
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.state import Policy
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet

BF16, FP32 = torch.bfloat16, torch.float32
POLICY = Policy(param=BF16, compute=BF16, reduce=FP32, master=FP32)
KEPT = Policy(param=BF16, compute=BF16, reduce=FP32, master=FP32, gradient=FP32)


def opened(resolved, **observers):
    return session(resolved, Environment(), RunDirectory(resolved.recipe.run.dir), observers)


def masters_of(state):
    return {part.pieces[0].name: part.tensor for part in state.world.parts}


def test_masters_are_the_draws_and_parameters_their_rounding(make_recipe):
    resolved = make_recipe(plugins(parameters="bf16"), training={"max_steps": 5})
    frozen = ("layers.1.", "norm")
    with opened(resolved, variant=Variant(frozen=frozen, unused=True)) as trainer:
        state = trainer.state
        with torch.device("meta"):
            drawn = Variant(frozen=frozen, unused=True).build_model(state.config)
        materialize(drawn, seed=resolved.recipe.seed, device="cpu", dtype=FP32)
        first, held = dict(drawn.named_parameters()), masters_of(state)
        assert held.keys() == {name for name, p in first.items() if p.requires_grad} and "unused" in held
        assert not any(part in name for name in held for part in frozen), "frozen parameters have no master"
        assert "lm_head.weight" not in held and state.model.lm_head.weight is state.model.model.embed_tokens.weight
        for name, parameter in state.model.named_parameters():
            assert parameter.dtype == BF16 and torch.equal(parameter, first[name].to(BF16)), name
            assert name not in held or torch.equal(held[name], first[name]), name
        rounded = [name for name in held if not torch.equal(held[name], state.model.get_parameter(name).float())]
        assert "model.embed_tokens.weight" in rounded, "the draws are not such that bf16 holds them"


class AfterBackward(Plugin):
    """Dtypes of parameters' gradients as backward left them, and of what flows through the model."""

    def __init__(self):
        super().__init__()
        self.raw, self.flowing = {}, set()

    @hookimpl
    def bind(self, state):
        for module in (*state.model.model.layers, state.model.model.norm, state.model.lm_head):
            module.register_forward_hook(lambda module, _, out: self.flowing.add(out.dtype))

    @hookimpl
    def post_backward(self, state):
        self.raw = {n: None if p.grad is None else p.grad.dtype for n, p in state.model.named_parameters()}
        assert state.loss.dtype == FP32


@pytest.mark.parametrize(("option", "kept"), [({}, BF16), ({"gradients": "fp32"}, FP32)])
@pytest.mark.parametrize("tied", [True, False])
def test_every_kind_of_parameter_trains_in_bf16_with_state_in_fp32(make_recipe, option, kept, tied):
    settings = plugins(parameters="bf16", **option)
    model = make_recipe(settings).tree["model"] | (VARIED | {"tie_word_embeddings": tied})
    resolved = make_recipe(settings, model=model, training={"max_steps": 5})
    seen = AfterBackward()
    with opened(resolved, seen=seen) as trainer:
        state = trainer.state
        before = {name: tensor.detach().clone() for name, tensor in masters_of(state).items()}
        trainer.train(Quiet(), Quiet())
        assert seen.raw.keys() == before.keys() and set(seen.raw.values()) == {kept}
        assert seen.flowing == {BF16}, "residual stream, norms and logits are in the parameters' dtype"
        for name, master in masters_of(state).items():
            assert not torch.equal(master, before[name]), f"{name} did not train"
            assert torch.equal(state.model.get_parameter(name), master.to(BF16)), f"{name} is not its master rounded"
            moments = state.optimizer.state[master]
            assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == FP32


def test_without_a_gradient_nothing_changes(make_recipe):
    resolved = make_recipe(plugins(parameters="bf16"), training={"max_steps": 5})
    frozen = ("layers.1.",)
    with opened(resolved, variant=Variant(frozen=frozen, unused=True)) as trainer:
        state = trainer.state
        still = {n for n, _ in state.model.named_parameters() if n == "unused" or "layers.1." in n}
        master = masters_of(state)["unused"].detach().clone()
        before = {name: state.model.get_parameter(name).detach().clone() for name in still}
        trainer.train(Quiet(), Quiet())
        assert len(still) > 5
        for name in still:
            assert torch.equal(state.model.get_parameter(name), before[name]), name
        assert torch.equal(masters_of(state)["unused"], master)
        assert masters_of(state)["unused"] not in state.optimizer.state


class Bytes(Plugin):
    """Bytes of parameters, their gradients, masters, and the optimizer's state, from live tensors."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    @hookimpl
    def post_reduce(self, state):
        self.gradients = sum(p.grad.nbytes for p in state.model.parameters())

    @hookimpl
    def post_step(self, state):
        masters = list(masters_of(state).values())
        self.counts = {
            "parameters": sum(p.nbytes for p in state.model.parameters()),
            "gradients": self.gradients,
            "masters": sum(m.nbytes for m in masters),
            "moments": sum(v.nbytes for m in masters for k, v in state.optimizer.state[m].items() if k != "step"),
        }
        assert all(m.grad is None for m in masters) and all(p.grad is None for p in state.model.parameters())


def test_model_state_is_two_and_two_and_twelve_bytes_a_parameter(make_recipe):
    resolved, counter = make_recipe(plugins(parameters="bf16"), training={"max_steps": 5}), Bytes()
    with opened(resolved, counter=counter) as trainer:
        trainer.train(Quiet(), Quiet())
        elements = sum(p.numel() for p in trainer.state.model.parameters())
    assert counter.counts == {
        "parameters": 2 * elements,
        "gradients": 2 * elements,
        "masters": 4 * elements,
        "moments": 8 * elements,
    }


class Product(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(("policy", "total"), [(POLICY, 256.0), (KEPT, 300.0)])
def test_microbatches_add_up_in_the_dtype_in_which_gradients_are_kept(policy, total):
    """bf16 has 8 significant bits: 256 + 1 is 256."""
    model = Product()
    masters = Masters(model, {"weight": "matrix"}, policy)
    for _ in range(300):
        model.weight.sum().backward()
    masters.take_gradients()
    (part,) = masters.parts
    assert part.tensor.grad.dtype == FP32 and part.tensor.grad.tolist() == [total] * 3
    shared = part.tensor.grad.data_ptr() == model.weight.grad.data_ptr()
    assert shared == (policy is KEPT), "kept in fp32, they are handed over without a copy"


def divided(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    drawn = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(distribute_tensor(drawn, mesh, [Shard(0)]))
    model.still = torch.nn.Parameter(distribute_tensor(drawn, mesh, [Shard(0)]), requires_grad=False)
    before, model.weight.mark = model.weight, "kept"
    masters = Masters(model, {"weight": "matrix", "still": "matrix"}, KEPT)
    (part,) = masters.parts
    assert model.weight is before and model.weight.mark == "kept"
    assert torch.equal(part.tensor.full_tensor(), drawn)
    assert torch.equal(model.weight.full_tensor(), drawn.to(BF16)) and model.still.to_local().dtype == BF16
    (model.weight * 3).sum().backward()
    masters.take_gradients()
    assert torch.equal(part.tensor.grad.full_tensor(), torch.full((7, 3), 3.0))
    with torch.no_grad():
        part.tensor.mul_(2)
    masters.give_weights()
    assert torch.equal(model.weight.full_tensor(), (drawn * 2).to(BF16))
    return part.tensor.to_local().dtype


def test_a_parameter_that_is_laid_out_as_a_dtensor_has_a_master_of_its_layout():
    assert run_ranks(2, divided) == [FP32, FP32]


def test_a_model_that_came_without_master_values_is_widened():
    model = Product().to(BF16)
    masters = Masters(model, {"weight": "matrix"}, POLICY)
    (part,) = masters.parts
    assert part.tensor.dtype == FP32 and model.weight.dtype == BF16
    part.tensor.data.mul_(2)
    assert model.weight.tolist() == [1.0] * 3, "the master is memory of its own"
    masters.give_weights()
    assert model.weight.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [({"compute": "bf16"}, BF16), ({"compute": "fp16"}, torch.float16), ({"parameters": "bf16"}, BF16)],
)
def test_evaluation_computes_in_the_same_dtype(make_recipe, precision, dtype):
    settings = plugins(**precision)
    data = make_recipe(settings).tree["data"] | {"validation_fraction": 0.1}
    resolved = make_recipe(settings, data=data, training={"max_steps": 5, "eval_every": 100})
    with opened(resolved) as trainer:
        seen = set()
        trainer.state.model.lm_head.register_forward_hook(lambda module, _, out: seen.add((out.dtype, module.training)))
        trainer.evaluate()
        assert seen == {(dtype, False)}


def test_llama_with_narrow_parameters_sums_its_losses_in_fp32(make_recipe):
    config = make_recipe(plugins(parameters="bf16"))
    with opened(config) as trainer:
        model, batch = trainer.state.model, trainer.state.loader.next().batches[0]
        assert isinstance(model, Llama)
        total = model(batch)
        wide = torch.nn.functional.cross_entropy(
            model.logits(batch.tokens, batch.positions, batch.document).double().flatten(0, 1),
            batch.labels.flatten(),
            ignore_index=-100,
            reduction="sum",
        )
        assert total.dtype == FP32
        # The same bf16 logits: what differs is the softmax and the sum in fp32 instead of fp64.
        torch.testing.assert_close(total.double(), wide, rtol=1e-6, atol=0)


def test_loaded_masters_reach_the_parameters(make_recipe):
    class Loads(Plugin):
        @hookimpl
        def load(self, state):
            with torch.no_grad():
                for part in state.world.parts:
                    part.tensor.fill_(0.3)
            return True

    resolved = make_recipe(plugins(parameters="bf16"), training={"max_steps": 5})
    with opened(resolved, loads=Loads()) as trainer:
        values = {float(value) for p in trainer.state.model.parameters() for value in p.detach().float().unique()}
    assert values == {float(torch.tensor(0.3).to(BF16))}
