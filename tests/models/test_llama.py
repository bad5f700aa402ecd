from __future__ import annotations

import copy

import pytest
import torch
from model_reference import SHAPES, batch, built, odd, packed, reference_loss
from torch.func import functional_call

from camshaft import ops as operations
from camshaft.models import llama
from camshaft.models.init import materialize
from camshaft.models.llama import Llama
from camshaft.ops import Ops, document_mask

pytestmark = pytest.mark.broad

shapes = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)


def close(got, wanted, tolerance=1e-12):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@shapes
@pytest.mark.parametrize("make", [batch, packed])
def test_loss_and_gradients_equal_the_reference(changes, make):
    config = odd(**changes)
    model, data = built(config), make(config)
    state = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    wanted = reference_loss(state, config, data)
    wanted.backward()
    loss = model(data)
    loss.backward()
    assert loss.dtype is torch.float64 and loss.shape == ()
    close(loss, wanted)
    for name, gradient in gradients(model).items():
        assert gradient.abs().max() > 0, name
        close(gradient, state[name].grad, 1e-11)


def test_gradients_agree_with_finite_differences():
    config = odd(num_hidden_layers=1, num_key_value_heads=3, qk_norm=True, attention_bias=True, vocab_size=13)
    model, data = built(config), packed(config)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), (data,))

    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


def test_packed_documents_equal_the_same_documents_alone():
    config = odd(num_key_value_heads=2)
    model, together = built(config), packed(config)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for number in together.document[row].unique().tolist():
            own = together.document[row] == number
            alone = batch(config)
            for field in ("tokens", "labels", "positions"):
                setattr(alone, field, getattr(together, field)[row, own].unsqueeze(0))
            total += model(alone)
    close(model(together), total)


def test_a_document_does_not_see_its_neighbours():
    config = odd(num_key_value_heads=2)
    model, data = built(config), packed(config)
    before = model.logits(data.tokens, data.positions, data.document)
    data.tokens[0, :5] = (data.tokens[0, :5] + 1) % config.vocab_size
    after = model.logits(data.tokens, data.positions, data.document)
    assert not torch.equal(before[0, :5], after[0, :5])
    assert torch.equal(before[0, 5:], after[0, 5:]) and torch.equal(before[1], after[1])


def test_one_document_equals_plain_causal_attention():
    config = odd(num_key_value_heads=3)
    model, data = built(config), batch(config)
    plain = model(data)
    data.document = torch.full_like(data.tokens, 7, dtype=torch.int32)
    close(model(data), plain)


def test_the_mask_is_built_once_a_forward():
    calls = []
    ops = Ops(document_mask=lambda document: calls.append(1) or document_mask(document))
    config = odd()
    model = built(config, ops=ops)
    model(packed(config))
    assert len(calls) == 1
    model(batch(config))
    assert len(calls) == 1


def test_positions_default_to_counting_from_zero():
    config = odd()
    model, data = built(config), batch(config)
    close(model.logits(data.tokens), model.logits(data.tokens, data.positions), 0)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_heads_equal_repeated_key_and_value_heads(groups):
    config = odd(num_key_value_heads=groups, attention_bias=True)
    grouped, full = built(config), built(odd(attention_bias=True))
    state = grouped.state_dict()
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = value.view(groups, config.head_dim, *value.shape[1:])
            state[name] = heads.repeat_interleave(6 // groups, 0).flatten(0, 1)
    full.load_state_dict(state)
    close(grouped(batch(config)), full(batch(config)))


def test_masked_groups_equal_repeated_heads_where_the_kernel_has_no_groups(monkeypatch):
    config = odd(num_key_value_heads=2, qk_norm=True)
    native, repeated = built(config), built(config)
    wanted = native(packed(config))
    wanted.backward()
    monkeypatch.setattr(operations, "MASKED_GROUPS", frozenset())
    loss = repeated(packed(config))
    loss.backward()
    close(loss, wanted)
    for name, gradient in gradients(repeated).items():
        close(gradient, gradients(native)[name])


def test_a_tied_gradient_is_the_sum_of_both_uses():
    tied, apart = built(odd(tie_word_embeddings=True)), built(odd())
    apart.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.lm_head.weight.detach().clone()})
    for model in (tied, apart):
        model(batch(model.config)).backward()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    close(tied.lm_head.weight.grad, apart.lm_head.weight.grad + apart.model.embed_tokens.weight.grad)
    close(tied.model.layers[0].mlp.up_proj.weight.grad, apart.model.layers[0].mlp.up_proj.weight.grad)


def test_names_are_those_of_hugging_face():
    names = set(built(odd(num_hidden_layers=1, attention_bias=True, qk_norm=True)).state_dict())
    layer = "model.layers.0."
    assert names == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight",
        *(f"{layer}self_attn.{kind}_proj.weight" for kind in "qkvo"),
        *(f"{layer}self_attn.{kind}_proj.bias" for kind in "qkv"),
        layer + "self_attn.q_norm.weight", layer + "self_attn.k_norm.weight",
        *(f"{layer}mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")),
    }  # fmt: skip


def test_a_tied_state_dict_holds_the_table_once_and_loads():
    model = built(odd(tie_word_embeddings=True))
    assert "lm_head.weight" not in model.state_dict()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    fresh = built(odd(tie_word_embeddings=True), seed=8)
    assert model(batch(model.config)) != fresh(batch(model.config))
    fresh.load_state_dict(model.state_dict())
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    close(fresh(batch(model.config)), model(batch(model.config)), 0)
    with pytest.raises(RuntimeError, match=r"model\.embed_tokens\.weight"):
        fresh.load_state_dict({name: value for name, value in model.state_dict().items() if "embed" not in name})


def test_a_tied_state_dict_works_below_a_wrapper():
    outer = torch.nn.Sequential(built(odd(tie_word_embeddings=True)))
    assert "0.lm_head.weight" not in outer.state_dict()
    fresh = torch.nn.Sequential(built(odd(tie_word_embeddings=True), seed=8))
    fresh.load_state_dict(outer.state_dict())
    close(fresh[0](batch(outer[0].config)), outer[0](batch(outer[0].config)), 0)


def test_a_copied_model_keeps_its_tie():
    model = copy.deepcopy(built(odd(tie_word_embeddings=True)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in model.state_dict()


def test_roles():
    found = built(odd(num_hidden_layers=1, attention_bias=True, qk_norm=True)).roles()
    of = {role: {name for name, value in found.items() if value == role} for role in set(found.values())}
    assert set(of) == {"matrix", "embedding", "norm", "bias"}
    assert of["embedding"] == {"model.embed_tokens.weight"}
    assert of["norm"] == {name for name in found if "norm" in name}
    assert of["bias"] == {name for name in found if name.endswith("bias")} and len(of["bias"]) == 3
    assert len(of["matrix"]) == 8 and "lm_head.weight" in of["matrix"]
    tied = built(odd(tie_word_embeddings=True)).roles()
    assert tied["model.embed_tokens.weight"] == "embedding" and "lm_head.weight" not in tied


@pytest.mark.parametrize("make", [batch, packed])
def test_a_batch_without_labels_has_zero_loss_and_zero_gradients(make):
    config = odd(tie_word_embeddings=True)
    model, data = built(config), make(config)
    data.labels = torch.full_like(data.labels, -100)
    loss = model(data)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(model).values())


def test_uncounted_tokens_add_nothing():
    config = odd()
    model, data = built(config), batch(config, rows=3)
    data.labels[1] = -100
    rest = batch(config, rows=3)
    for field in ("tokens", "labels", "positions"):
        setattr(rest, field, getattr(data, field)[[0, 2]])
    close(model(data), model(rest))


@shapes
def test_bf16_autocast_runs_in_fp32_where_it_matters(changes):
    config = odd(initializer_range=0.05, **changes)
    model, data = built(config, torch.float32), packed(config)
    exact = model(data)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(data)
        logits = model.logits(data.tokens, data.positions, data.document)
    loss.backward()
    assert loss.dtype is torch.float32 and logits.dtype is torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.0)
    assert all(g.dtype is torch.float32 and bool(g.isfinite().all()) for g in gradients(model).values())


@shapes
def test_bf16_weights_run_with_an_fp32_loss(changes):
    config = odd(initializer_range=0.05, **changes)
    exact = built(config, torch.float32)
    model, data = copy.deepcopy(exact).bfloat16(), packed(config)
    loss = model(data)
    loss.backward()
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, exact(data), rtol=0.02, atol=0.0)
    assert all(g.dtype is torch.bfloat16 and bool(g.isfinite().all()) for g in gradients(model).values())


def test_the_loss_of_bf16_logits_is_computed_in_fp32():
    logits = (torch.randn(3, 40, 500, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    labels = torch.randint(500, (3, 40), generator=torch.Generator().manual_seed(1))
    exact = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(llama.TokenLoss()(logits, labels).double(), exact, rtol=1e-6, atol=0.0)


def test_a_forward_never_looks_at_values():
    """On meta there are none: a host synchronisation anywhere would raise."""
    config = odd(num_key_value_heads=2)
    with torch.device("meta"):
        model = Llama(config)
    data = packed(config)
    for field in ("tokens", "labels", "positions", "document"):
        setattr(data, field, getattr(data, field).to("meta"))
    loss = model(data)
    loss.backward()
    assert loss.is_meta and all(gradient.is_meta for gradient in gradients(model).values())


def test_a_forward_compiles_as_one_graph():
    config = odd(num_key_value_heads=2, qk_norm=True)
    model, data = built(config), packed(config)

    def loss(tokens, positions, document):
        return model.logits(tokens, positions, document)

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    close(compiled(data.tokens, data.positions, data.document), loss(data.tokens, data.positions, data.document), 0)


def test_frozen_parameters_get_no_gradient():
    config = odd()
    with torch.device("meta"):
        model = Llama(config)
    model.model.embed_tokens.requires_grad_(False)
    materialize(model, seed=0, device="cpu", dtype=torch.float32)
    model(batch(config)).backward()
    assert {name for name, g in gradients(model).items() if g is None} == {"model.embed_tokens.weight"}


def test_equals_transformers_where_it_is_installed():
    """Not a dependency. It keeps norms and rotations in fp32 in an fp64 model, hence the tolerance."""
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="not a dependency of ours")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    for name, changes in SHAPES.items():
        config = odd(**changes)
        rope = {"rope_type": "default"} if config.rope_scaling is None else config.rope_scaling.as_dict()
        family = "Qwen3" if config.qk_norm else "Qwen2" if config.attention_bias else "Llama"
        settings = getattr(transformers, f"{family}Config")(
            **{key: getattr(config, key) for key in same},
            rope_parameters=rope | {"rope_theta": config.rope_theta},
            attn_implementation="eager",
        )
        theirs = getattr(transformers, f"{family}ForCausalLM")(settings).double()
        ours, data = built(config), batch(config)
        missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
        assert not unexpected and missing == ["lm_head.weight"] * config.tie_word_embeddings, name
        close(ours.logits(data.tokens), theirs(data.tokens).logits, 2e-5)
