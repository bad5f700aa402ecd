"""Packages that are not here: what is called stands in for them, and takes exactly the arguments that they document."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from camshaft import ops
from camshaft.parts import Part, Parts, Piece

MODULES = ("apex", "flash_attention", "liger", "transformer_engine")


@pytest.fixture
def package(monkeypatch):
    """Put stand-ins for modules into their places; the adapters are imported anew."""

    def put(name, **members):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            part = ".".join(parts[:end])
            if part not in sys.modules or not getattr(sys.modules[part], "stands_in", False):
                module = ModuleType(part)
                module.stands_in = True
                monkeypatch.setitem(sys.modules, part, module)
        for key, value in members.items():
            setattr(sys.modules[name], key, value)

    for each in MODULES:
        monkeypatch.delitem(sys.modules, f"camshaft_kernels.providers.{each}", raising=False)
    yield put
    for each in MODULES:
        sys.modules.pop(f"camshaft_kernels.providers.{each}", None)


def adapter(name):
    from importlib import import_module

    return import_module(f"camshaft_kernels.providers.{name}")


class AmpC:
    """What ``amp_C`` has, in plain torch, with its arguments in its order."""

    @staticmethod
    def multi_tensor_adam(chunk, flag, lists, lr, beta1, beta2, eps, step, mode, corrected, decay):
        assert (chunk, flag.dtype, mode, corrected) == (65536, torch.int32, 1, 1)
        for gradient, parameter, mean, square in zip(*lists, strict=True):
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            direction = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)
            parameter.sub_(direction + decay * parameter, alpha=lr)

    @staticmethod
    def multi_tensor_lamb(
        chunk, flag, lists, lr, beta1, beta2, eps, step, corrected, decay, averaged, mode, norm, limit, nvlamb
    ):
        assert (chunk, corrected, averaged, mode, nvlamb) == (65536, 1, 1, 1, False)
        factor = limit / float(norm) if float(norm) > limit else 1.0
        for gradient, parameter, mean, square in zip(*lists, strict=True):
            gradient = gradient * factor
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps) + decay * parameter
            weight, length = parameter.norm(), update.norm()
            ratio = weight / length if decay != 0 and weight > 0 and length > 0 else 1.0
            parameter.sub_(lr * ratio * update)

    @staticmethod
    def multi_tensor_l2norm(chunk, flag, lists, per_tensor):
        (tensors,) = lists
        assert per_tensor is False
        return torch.stack([each.norm() for each in tensors]).norm().reshape(1), torch.empty(0)


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


SHAPES = ((7, 3), (5,), (1,))


def test_apex_adamw_is_torchs(package):
    package("amp_C", multi_tensor_adam=AmpC.multi_tensor_adam)
    (update,) = adapter("apex").adamw().values()
    mine, theirs = tensors(*SHAPES), [each.clone().requires_grad_() for each in tensors(*SHAPES)]
    means, squares = [[torch.zeros_like(each) for each in mine] for _ in range(2)]
    optimizer = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)
    for step in (1, 2, 3):
        gradients = tensors(*SHAPES, seed=step)
        scale = torch.tensor(0.5**step)  # another one each time: Adam does not see a constant factor
        for each, gradient in zip(theirs, gradients, strict=True):
            each.grad = gradient * scale
        optimizer.step()
        options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.3, "scale": scale}
        update(mine, gradients, means, squares, step, **options)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6)
    update([], [], [], [], 1, **options)


def parts_of(values):
    found = []
    for index, value in enumerate(values):
        role = "matrix" if value.ndim > 1 else "norm"
        piece = Piece(f"p{index}", tuple(value.shape), 0, 0, value.numel())
        found.append(Part(torch.nn.Parameter(value.clone()), role, (piece,)))
    return Parts(tuple(found))


def lamb(values, update, **changes):
    from camshaft_lamb import Options
    from camshaft_lamb.optimizer import Lamb, may_be_fused

    options = Options(**{"lr": 0.01, "max_ratio": None, **changes})
    parts = parts_of(values)
    chosen = update if may_be_fused(parts, options) else None
    names = [f"p{index}" for index in range(len(values))]
    return Lamb(parts, names, torch.device("cpu"), options, chosen), parts


def test_apex_lamb_is_ours(package):
    """Matrices with a ratio and decay, vectors with neither; what apex cannot do is left to ours."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        AmpC.multi_tensor_lamb(*arguments)

    package("amp_C", multi_tensor_lamb=counted)
    (update,) = adapter("apex").lamb().values()
    results = []
    for chosen in (update, None):
        optimizer, parts = lamb(tensors((7, 3), (5,), (4, 4)), chosen)
        for step in (1, 2):
            for part, gradient in zip(parts, tensors((7, 3), (5,), (4, 4), seed=step), strict=True):
                part.tensor.grad = gradient
            optimizer.step()
        results.append([part.tensor.detach() for part in parts])
    assert len(calls) == 4, "groups x steps"
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for changes in ({"max_ratio": 10.0}, {"exempt_vectors": False}, {"weight_decay": 0.0}):
        assert lamb(tensors((7, 3)), update, **changes)[0]._update is None


def test_apex_norm_of_gradients_is_what_clipping_takes(package):
    from camshaft_clip.norm import Clipper

    package("amp_C", multi_tensor_l2norm=AmpC.multi_tensor_l2norm)
    (norm,) = adapter("apex").grad_norm().values()
    parts = parts_of(tensors((7, 3), (5,)))
    for part, gradient in zip(parts, tensors((7, 3), (5,), seed=4), strict=True):
        part.tensor.grad = gradient
    calls = []

    def counted(values):
        calls.append(len(values))
        return norm(values)

    options = {"master": torch.float32, "device": torch.device("cpu")}
    found = Clipper(parts, 1.0, **options, local=counted).norm()
    torch.testing.assert_close(found, Clipper(parts, 1.0, **options).norm())
    assert calls == [2] and found.shape == ()


def test_apex_norms_promote_and_leave_autocast(package):
    def fused_rms_norm_affine(hidden, weight, shape, eps):
        assert hidden.dtype == weight.dtype and shape == (6,) and not torch.is_autocast_enabled("cpu")
        return F.rms_norm(hidden, shape, weight, eps)

    def fused_layer_norm_affine(hidden, weight, bias, shape, eps):
        assert hidden.dtype == weight.dtype == bias.dtype
        return F.layer_norm(hidden, shape, weight, bias, eps)

    members = {"fused_rms_norm_affine": fused_rms_norm_affine, "fused_layer_norm_affine": fused_layer_norm_affine}
    package("apex.normalization.fused_layer_norm", **members)
    module = adapter("apex")
    hidden, other, weight = tensors((2, 3, 6), (2, 3, 6), (6,))
    hidden = hidden.bfloat16()
    entries = module.rms_norm()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(entries["rms_norm"](hidden, weight, 1e-6), ops.rms_norm(hidden, weight, 1e-6))
        for one, two in zip(
            entries["add_rms_norm"](hidden, other, weight, 1e-6),
            ops.add_rms_norm(hidden, other, weight, 1e-6),
            strict=True,
        ):
            torch.testing.assert_close(one, two)
        normed = module.layer_norm()["layer_norm"](hidden, weight, None, 1e-6)
    torch.testing.assert_close(normed, ops.layer_norm(hidden, weight, None, 1e-6))


def heads():
    return tensors((2, 12, 4, 8), (2, 12, 2, 8), (2, 12, 2, 8))


DOCUMENT = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3], [0] * 12], dtype=torch.int32)


def packed(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal=False, window_size=(-1, -1)):
    """Documents one by one, for both functions that take all of them at once."""
    assert causal or window_size == (-1, 0)
    assert bounds_q.dtype == torch.int32 and torch.equal(bounds_q, bounds_k)
    lengths = bounds_q.diff()
    assert int(lengths.max()) <= longest_q == longest_k and int(lengths.min()) > 0 and int(bounds_q[-1]) == len(q)
    made = [
        ops.attention(q[begin:end][None], k[begin:end][None], v[begin:end][None])[0]
        for begin, end in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True)
    ]
    return torch.cat(made)


def test_flash_attention(package):
    def flash_attn_func(q, k, v, causal=False):
        assert causal
        return ops.attention(q, k, v)

    package("flash_attn", flash_attn_func=flash_attn_func, flash_attn_varlen_func=packed)
    module, (q, k, v) = adapter("flash_attention"), heads()
    torch.testing.assert_close(module.attention()["attention"](q, k, v), ops.attention(q, k, v))
    entries = module.document_attention()
    wanted = ops.document_attention(q, k, v, ops.document_mask(DOCUMENT))
    made = entries["document_attention"](q, k, v, entries["document_mask"](DOCUMENT))
    torch.testing.assert_close(made, wanted)


def test_torchs_own_function_for_lengths(monkeypatch):
    from torch.nn.attention import varlen

    from camshaft_kernels.providers.torch import varlen as entries_of

    monkeypatch.setattr(varlen, "varlen_attn", packed)
    entries, (q, k, v) = entries_of(), heads()
    wanted = ops.document_attention(q, k, v, ops.document_mask(DOCUMENT))
    made = entries["document_attention"](q, k, v, entries["document_mask"](DOCUMENT))
    torch.testing.assert_close(made, wanted)


def test_transformer_engine(package):
    made = []

    class DotProductAttention:
        def __init__(self, heads, width, num_gqa_groups, attention_dropout, qkv_format, attn_mask_type):
            assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "bshd", "causal")
            made.append((heads, width, num_gqa_groups))

        def __call__(self, q, k, v):
            return ops.attention(q, k, v).flatten(2)

    def parallel_cross_entropy(logits, labels, smoothing, reduce, group, ignored):
        assert (smoothing, reduce, group, ignored, logits.ndim) == (0.0, False, None, -100, 3)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=ignored)
        logits.data.fill_(float("nan"))  # as the package does with its gradient
        return losses.view(labels.shape)

    package("transformer_engine.pytorch.cross_entropy", parallel_cross_entropy=parallel_cross_entropy)
    package("transformer_engine.pytorch", DotProductAttention=DotProductAttention)
    module, (q, k, v) = adapter("transformer_engine"), heads()
    attention = module.attention()["attention"]
    for _ in range(2):
        torch.testing.assert_close(attention(q, k, v), ops.attention(q, k, v))
    assert made == [(4, 8, 2)], "one module for all layers"
    (logits,), labels = tensors((2, 5, 11)), torch.tensor([[0, 10, -100, 3, 4]] * 2)
    torch.testing.assert_close(
        module.cross_entropy()["cross_entropy"](logits, labels), ops.cross_entropy(logits, labels)
    )


def test_what_liger_writes_over_is_a_copy(package):
    """Its kernels put the rotated vectors, and the gradient of the logits, where they found their inputs."""

    def rotated(value, cos, sin):
        half = value.shape[-1] // 2
        turned = torch.cat((-value[..., half:], value[..., :half]), -1)
        return value * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

    def rope(q, k, cos, sin):
        return tuple(each.copy_(rotated(each, cos, sin)) for each in (q, k))

    def loss(logits, labels, *plain):
        assert plain == (None, -100, 0.0, 0.0, "sum") and logits.dtype == torch.float32
        found = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        logits.fill_(float("nan"))
        return found, None

    given = {"LigerRopeFunction": rope, "LigerCrossEntropyFunction": loss}
    for place, name in LIGER.items():
        package(f"liger_kernel.ops.{place}", **{name: SimpleNamespace(apply=given.get(name))})
    module, (q, k, _) = adapter("liger"), heads()
    angles = torch.arange(12.0).view(1, 12, 1, 1) * torch.tensor([1.0, 0.3, 0.1, 0.03] * 2)
    signed = angles.sin() * torch.tensor([-1.0] * 4 + [1.0] * 4)
    kept = [each.clone() for each in (q, k)]
    made = module.rope()["rope"](q, k, (angles.cos(), signed), torch.float32)
    assert torch.equal(q, kept[0]) and torch.equal(k, kept[1])
    for one, other in zip(made, ops.rope(q, k, (angles.cos(), signed), torch.float32), strict=True):
        torch.testing.assert_close(one, other)
    (logits,), labels = tensors((2, 5, 11)), torch.tensor([[0, 10, -100, 3, 4]] * 2)
    found = module.cross_entropy()["cross_entropy"](logits, labels)
    torch.testing.assert_close(found, ops.cross_entropy(logits, labels))


LIGER = {
    "cross_entropy": "LigerCrossEntropyFunction",
    "fused_linear_cross_entropy": "LigerFusedLinearCrossEntropyFunction",
    "layer_norm": "LigerLayerNormFunction",
    "rms_norm": "LigerRMSNormFunction",
    "rope": "LigerRopeFunction",
    "swiglu": "LigerSiLUMulFunction",
}


def test_liger_is_too_old_before_0_6(monkeypatch):
    from camshaft_kernels import packages

    for version, wanted in (("0.5.10", "older than 0.6"), ("0.6.0", None), ("1.0", None)):
        names = {"has_module": lambda name: True, "version": lambda name, version=version: version}
        monkeypatch.setattr(packages, "inventory", SimpleNamespace(**names))
        lack = packages.lack("liger")
        assert (lack is None) == (wanted is None) and (lack is None or wanted in lack[0])
