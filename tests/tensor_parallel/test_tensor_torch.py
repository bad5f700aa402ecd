"""Beside torch's own ``parallelize_module``, told by hand how to divide the same decoder: the same gradients."""

import pytest
import torch
from tensor_cases import recipe
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from camshaft.data import prepare
from camshaft.data.loader import Loader
from camshaft.models.init import materialize
from camshaft.models.llama import Llama
from camshaft.recipe import check
from camshaft.state import BatchPlan
from camshaft.testing.ranks import run_ranks
from camshaft.testing.record import distance
from camshaft.testing.run import record_rank
from tools.bench.peers_tensor import sum_before_norms


def by_hand(sequence):
    """The plan of torch's documentation, for this decoder."""
    between = Shard(1) if sequence else Replicate()
    layer = {
        "self_attn": PrepareModuleInput(
            input_layouts=(between, None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=between),
        "mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=between),
    }
    outside = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "lm_head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        layer |= {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel()}
        outside["model.norm"] = SequenceParallel()
    return outside, layer


def torchs(rank, world_size, resolved, sequence):
    """Loss and gradients of the first microbatch of the run, by torch."""
    config = check(resolved, world_size).require().config
    with torch.device("meta"):
        model = Llama(config)
    materialize(model, seed=resolved.recipe.seed, device="cpu", dtype=torch.float64)
    mesh = init_device_mesh("cpu", (world_size,))
    outside, layer = by_hand(sequence)
    parallelize_module(model, mesh, outside)
    for block in model.model.layers:
        sum_before_norms(block)
        parallelize_module(block, mesh, layer)
    size = resolved.recipe.batch.global_batch_size
    loader = Loader(prepare(resolved).train, BatchPlan(size, size, 1), index=0, degree=1, seed=resolved.recipe.seed)
    loader.seek(0)
    (batch,) = loader.next().batches
    loader.close()
    with loss_parallel():
        logits = model.lm_head(model.model(batch.tokens, batch.positions, batch.document))
        labels = batch.labels.flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / int(
            (labels >= 0).sum()
        )
        loss.backward()
    loss = loss.detach()
    return float(loss.full_tensor() if isinstance(loss, DTensor) else loss), {
        name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
def test_gradients_are_those_of_torch(make_recipe, sequence):
    model = {"tie_word_embeddings": False, "vocab_size": 260}
    resolved = recipe(make_recipe, 2, tensor={"sequence_parallel": sequence}, **model)
    loss, gradients = run_ranks(2, torchs, resolved, sequence, timeout_s=100)[0]
    first = run_ranks(2, record_rank, resolved, timeout_s=100)[0][0]
    assert abs(first.loss - loss) <= 1e-12 * abs(loss)
    assert first.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert distance(first.gradients[name], gradient) <= 1e-12, name
