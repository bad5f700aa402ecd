"""AdamW over lists of tensors in one launch."""

import pytest
import torch
from triton_cases import DEVICE, randn

TRITON = "interpreted"
SIZES = [(5,), (0,), (37_001,), (1,), (7, 33), (16, 8)]
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def kernel():
    from camshaft_kernels.triton import adamw

    return adamw


class Training:
    """Parameters, gradients of a few steps and moments, beside ``torch.optim.AdamW`` in fp64."""

    def __init__(self, tensors, gradient=None, scale=None, **hyper):
        self.parameters = [tensor.detach() for tensor in tensors]
        self.gradient, self.scale, self.hyper = gradient, scale, HYPER | hyper
        self.first = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in self.parameters]
        self.second = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in self.parameters]
        self.exact = [tensor.double().clone().requires_grad_() for tensor in self.parameters]
        self.peer = torch.optim.AdamW(self.exact, **self.hyper)

    def gradients(self, step):
        for index, tensor in enumerate(self.parameters):
            yield randn(*tensor.shape, dtype=self.gradient or tensor.dtype, seed=100 * step + index).detach()

    def step(self, number):
        gradients = list(self.gradients(number))
        for parameter, gradient in zip(self.exact, gradients, strict=True):
            parameter.grad = gradient.double() * (1 if self.scale is None else self.scale.double())
        self.peer.step()
        kernel().adamw(self.parameters, gradients, self.first, self.second, number, scale=self.scale, **self.hyper)
        return gradients

    def errors(self, of):
        """Largest deviation of any tensor, by its largest element."""
        wanted = self.exact if of == "parameters" else [self.peer.state[each][of] for each in self.exact]
        mine = {"parameters": self.parameters, "exp_avg": self.first, "exp_avg_sq": self.second}[of]
        pairs = [(one.double(), other.detach()) for one, other in zip(mine, wanted, strict=True) if one.numel()]
        return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def tensors(dtype=torch.float32):
    return [randn(*shape, dtype=dtype) for shape in SIZES]


@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equal_to_torch(scale, weight_decay):
    scale = None if scale is None else torch.tensor(scale, device=DEVICE)
    training = Training(tensors(), scale=scale, weight_decay=weight_decay)
    for number in range(1, 6):
        training.step(number)
        assert max(training.errors(of) for of in ("parameters", "exp_avg", "exp_avg_sq")) < 1e-5


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32], ids=str)
def test_bf16_parameters(gradient):
    """One rounding of an exact step; moments keep fp32."""
    training = Training(tensors(torch.bfloat16), gradient=gradient)
    training.step(1)
    for mine, exact in zip(training.parameters, training.exact, strict=True):
        assert torch.allclose(mine.double(), exact.detach().to(torch.bfloat16).double(), rtol=2**-7, atol=1e-9)
        assert (mine != exact.detach().to(torch.bfloat16)).sum() <= mine.numel() // 1000  # ties of fp32 and fp64
    assert max(training.errors(of) for of in ("exp_avg", "exp_avg_sq")) < 1e-5
    training.step(2)
    assert training.errors("parameters") < 1e-2


def test_late_step_and_small_numbers():
    """Bias corrections near 1, and gradients whose squares fp32 barely holds."""
    training = Training([randn(300, scale=1e-3)], scale=torch.tensor(1e-12, device=DEVICE), eps=1e-15)
    for number in range(1, 4):
        training.step(number)
    assert training.errors("parameters") < 1e-5
    training = Training([randn(300)])
    training.step(1)
    training.peer.state[training.exact[0]]["step"].fill_(99_999)
    training.step(100_000)
    assert training.errors("parameters") < 1e-5


def test_gradients_are_not_changed():
    training = Training(tensors(), scale=torch.tensor(0.5, device=DEVICE))
    given = training.step(1)
    assert all(torch.equal(one, other) for one, other in zip(given, training.gradients(1), strict=True))


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_layout_changes_no_bit(start):
    """Tensors of their own, and the same elements within one flat buffer at any place, with wide loads or without."""
    apart = Training(tensors())
    lengths = [tensor.numel() for tensor in apart.parameters]
    flat = torch.zeros(start + sum(lengths), device=DEVICE)
    flat[start:] = torch.cat([tensor.flatten() for tensor in apart.parameters])
    moments = torch.zeros(2, sum(lengths), device=DEVICE)
    for number in range(1, 4):
        gradient = torch.cat([gradient.flatten() for gradient in apart.step(number)])
        kernel().adamw([flat[start:]], [gradient], [moments[0]], [moments[1]], number, **HYPER)
    assert torch.equal(flat[start:], torch.cat([tensor.flatten() for tensor in apart.parameters]))
    assert torch.equal(moments[1], torch.cat([tensor.flatten() for tensor in apart.second]))
    assert not flat[:start].any()


def test_neighbours_are_not_touched():
    buffer = torch.full((40_000,), 7.0, device=DEVICE)
    piece = buffer[3:20_002]
    moments = [torch.zeros(19_999, device=DEVICE) for _ in range(2)]
    kernel().adamw([piece], [torch.ones_like(piece)], moments[:1], moments[1:], 1, **HYPER)
    assert (buffer[:3] == 7).all()
    assert (buffer[20_002:] == 7).all()
    assert (piece != 7).all()


def test_not_contiguous():
    whole = randn(12, 9).detach()
    training = Training([whole.t(), randn(8, 20)[:, ::2]])
    for number in range(1, 3):
        training.step(number)
    assert training.errors("parameters") < 1e-5
    assert training.parameters[0].data_ptr() == whole.data_ptr()


def test_dtypes_mixed_in_one_list():
    training = Training([randn(100), randn(50, dtype=torch.bfloat16), randn(9)], gradient=torch.float32)
    training.step(1)
    assert training.parameters[1].dtype == torch.bfloat16
    assert max(training.errors(of) for of in ("exp_avg", "exp_avg_sq")) < 1e-5
    assert training.errors("parameters") < 1e-2


def test_scale_that_is_not_finite_shows():
    """What skips a step looks at the scale before; here it must not be swallowed."""
    training = Training([randn(10)], scale=torch.tensor(float("nan"), device=DEVICE))
    training.step(1)
    assert training.parameters[0].isnan().all()


def test_tables_are_kept_and_bounded():
    module = kernel()
    module._tables.clear()
    training = Training([randn(100), randn(200)])
    gradients = list(training.gradients(1))
    for number in range(1, 4):
        module.adamw(training.parameters, gradients, training.first, training.second, number, **HYPER)
    assert len(module._tables) == 1
    many = [Training([randn(3)]) for _ in range(module.TABLES + 5)]
    for each in many:
        each.step(1)
    assert len(module._tables) <= module.TABLES
    assert all(each.errors("parameters") < 1e-5 for each in many)


def test_a_table_is_of_sizes_too():
    """The same addresses: of tensors, and then of their beginnings."""
    four = [randn(40_000, seed=seed).detach() for seed in range(4)]
    kernel().adamw(*([each] for each in (*four[:3], four[3].abs_())), 1, **HYPER)
    before = [each.clone() for each in four]
    kernel().adamw(*([each[:5]] for each in four), 2, **HYPER)
    for each, was in zip(four, before, strict=True):
        assert torch.equal(each[5:], was[5:])
    assert (four[0][:5] != before[0][:5]).all()


def test_autograd_sees_the_change():
    weight = randn(5)
    used = (weight * weight).sum()
    moments = [torch.zeros(5, device=DEVICE) for _ in range(2)]
    kernel().adamw([weight], [torch.ones(5, device=DEVICE)], moments[:1], moments[1:], 1, **HYPER)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.backward()


def test_nothing_to_do():
    kernel().adamw([], [], [], [], 1, **HYPER)


def test_refused():
    tensor = randn(5).detach()
    with pytest.raises(ValueError, match="differ in shape"):
        kernel().adamw([tensor], [tensor[:4]], [tensor], [tensor], 1, **HYPER)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        kernel().adamw([tensor], [], [tensor], [tensor], 1, **HYPER)
    with pytest.raises(TypeError, match=r"does not take torch\.float64"):
        kernel().adamw([tensor.double()], [tensor], [tensor], [tensor], 1, **HYPER)
