"""BaseLinear: every kind of base answers the same questions and computes the same LoRA."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyfastpeft.nn import BaseLinear, NF4Linear, as_base_linear, register_base_linear
from pyfastpeft.nn.dense import first_non_finite
from pyfastpeft.reference import lora as reference

K, N, R = 40, 24, 3


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(K, N, dtype=dtype).requires_grad_(False)


def conv1d(dtype=torch.float32):
    torch.manual_seed(0)
    conv = Conv1D(N, K).requires_grad_(False)
    with torch.no_grad():
        conv.weight.normal_()
        conv.bias.normal_()
    return conv.to(dtype)


def nf4(dtype=torch.float32, **kwargs):
    return NF4Linear.from_linear(linear(dtype), **kwargs)


def hooked(dtype=torch.float32):
    module = linear(dtype)
    module.register_forward_hook(lambda *a: None)
    return module


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_forward(dtype=torch.float32):
    module = linear(dtype)
    module.forward = lambda x: nn.Linear.forward(module, x)  # as offloading does
    return module


KINDS = [linear, conv1d, nf4, hooked, own_forward]


def adapters(dtype=torch.float32):
    torch.manual_seed(1)
    a, b = torch.randn(R, K, dtype=dtype), torch.randn(N, R, dtype=dtype)
    return a.requires_grad_(), b.requires_grad_()


def error(y, truth):
    return (y.double() - truth).norm().item() / truth.norm().item()


@pytest.mark.parametrize("kind", KINDS)
def test_facts(kind):
    base = as_base_linear(kind(torch.bfloat16))
    assert (base.in_features, base.out_features) == (K, N)
    assert base.weight_dtype == torch.bfloat16 and base.device.type == "cpu"
    assert base.fan_in_fan_out == (kind is conv1d) and base.is_quantized == (kind is nf4)
    assert base.get_weight().shape == (N, K) and base.get_weight().dtype == torch.bfloat16
    assert base.get_weight(torch.float32).dtype == torch.float32
    assert not base.get_weight().requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_forward_lora_equals_the_reference(kind, dropout_p):
    module = kind()
    base = as_base_linear(module)
    a, b = adapters()
    x = (torch.randn(2, 5, K) + 0.5).requires_grad_()
    seed = torch.tensor([7])
    y = base.forward_lora(x, a, b, 0.5, dropout_p, seed)
    go = torch.randn_like(y)
    y.backward(go)

    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    weight = base.get_weight(torch.float32).double()
    truth = reference.linear_lora(exact[0], weight, module.bias.double(), exact[1], exact[2], 0.5, dropout_p, 7)
    truth.backward(go.double())
    assert error(y, truth) < 1e-6
    for mine, theirs in zip((x, a, b), exact, strict=True):
        assert error(mine.grad, theirs.grad) < 1e-6
    assert error(base.forward(x.detach()), nn.functional.linear(exact[0], weight, module.bias.double())) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_adapters_do_not_drag_bf16_activations(kind):
    a, b = adapters()
    y = as_base_linear(kind(torch.bfloat16)).forward_lora(torch.randn(4, K, dtype=torch.bfloat16), a, b, 0.5)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [linear, nf4, hooked])
def test_autocast(kind):
    a, b = adapters()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = as_base_linear(kind()).forward_lora(torch.randn(4, K), a, b, 0.5, 0.1)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert a.grad.dtype == torch.float32 and a.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [linear, conv1d, nf4])
def test_compiles_whole_and_once_for_all_steps(kind):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = kind()
            self.a, self.b = (nn.Parameter(t.detach()) for t in adapters())

        def forward(self, x):
            return as_base_linear(self.base_layer).forward_lora(x, self.a, self.b, 0.5, 0.3)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(3):
        torch.manual_seed(3)
        x = torch.randn(4, K)
        torch.manual_seed(4)
        y = compiled(x)
        y.sum().backward()
        torch.manual_seed(4)
        torch.testing.assert_close(y, layer(x))
    assert counter.frame_count == 1
    assert layer.a.grad.abs().sum() > 0


def test_hooks_of_the_module_run():
    module = linear()
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    as_base_linear(module).forward_lora(torch.randn(2, K), *adapters(), 1.0)
    assert calls == [1]


def test_a_subclass_with_its_own_forward_is_called():
    torch.manual_seed(0)
    module = Doubled(K, N)
    a, b = adapters()
    x = torch.randn(2, K)
    torch.testing.assert_close(as_base_linear(module).forward_lora(x, a, b, 0.5), module(x) + 0.5 * x @ a.T @ b.T)


@pytest.mark.parametrize("kind", [linear, conv1d])
def test_set_weight_of_a_dense_base_is_in_place_and_exact(kind):
    module = kind()
    base, parameter = as_base_linear(module), module.weight
    new = torch.randn(N, K, dtype=torch.float64).float()
    assert base.set_weight(new) == 0.0
    assert module.weight is parameter and torch.equal(base.get_weight(), new)
    x = torch.randn(3, K)
    torch.testing.assert_close(module(x), nn.functional.linear(x, new, module.bias))


@pytest.mark.parametrize("kind", [linear, conv1d])
def test_set_weight_reports_what_a_narrow_dtype_costs(kind):
    base = as_base_linear(kind(torch.bfloat16))
    new = torch.randn(N, K)
    cost = base.set_weight(new)
    assert cost == pytest.approx(
        ((new.bfloat16().double() - new.double()).norm() / new.double().norm()).item(), rel=1e-9
    )
    assert 1e-4 < cost < 1e-2


@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "double_quant": False, "blocksize": 32}])
def test_set_weight_of_a_4bit_base_requantises_the_same_way(options):
    module = nf4(torch.bfloat16, **options)
    before = module.quantized
    base, packed = as_base_linear(module), module.weight
    new = torch.randn(N, K)
    cost = base.set_weight(new)
    after = module.quantized
    assert cost == pytest.approx(((base.get_weight(torch.float32) - new).norm() / new.norm()).item(), rel=1e-6)
    assert 0.05 < cost < 0.2
    assert module.weight is packed, "in place"
    assert (after.blocksize, after.quant_type, after.is_nested, after.dtype) == (
        before.blocksize, before.quant_type, before.is_nested, torch.bfloat16,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [linear, conv1d, nf4])
def test_a_snapshot_restores_every_bit(kind):
    module = kind(torch.bfloat16)
    base = as_base_linear(module)
    saved = {key: value.clone() for key, value in module.state_dict().items()}
    snapshot = base.snapshot_weight()
    base.set_weight(base.get_weight(torch.float32) + torch.randn(N, K))
    assert not torch.equal(module.state_dict()["weight"], saved["weight"])
    base.restore_weight(snapshot)
    assert all(torch.equal(value, saved[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("kind", [linear, conv1d, nf4])
def test_to_dense(kind):
    module = kind().eval()
    base = as_base_linear(module)
    dense = base.to_dense(dtype=torch.bfloat16)
    assert type(dense) is (Conv1D if kind is conv1d else nn.Linear) and not dense.training
    assert dense.weight.dtype == dense.bias.dtype == torch.bfloat16
    assert torch.equal(as_base_linear(dense).get_weight(), base.get_weight().bfloat16())
    new = torch.randn(N, K)
    other = base.to_dense(new)
    assert torch.equal(as_base_linear(other).get_weight(), new) and torch.equal(other.bias, module.bias)
    assert as_base_linear(other).get_weight().data_ptr() != new.data_ptr()
    assert base.to_dense().weight.data_ptr() != module.weight.data_ptr()


@pytest.mark.parametrize("kind", [linear, conv1d, nf4])
@pytest.mark.parametrize(
    ("new", "exception", "message"),
    [
        (torch.randn(N, K + 1), ValueError, r"shape \(24, 41\), expected \(24, 40\)"),
        (torch.zeros(N, K, dtype=torch.int64), TypeError, "torch.int64"),
        (
            torch.randn(N, K).index_put((torch.tensor(3), torch.tensor(9)), torch.tensor(float("inf"))),
            ValueError,
            r"\[3, 9\] is inf",
        ),
    ],
    ids=["shape", "dtype", "inf"],
)
def test_a_bad_new_weight_is_named_and_changes_nothing(kind, new, exception, message):
    module = kind()
    saved = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(exception, match=message):
        as_base_linear(module).set_weight(new)
    assert all(torch.equal(value, saved[key]) for key, value in module.state_dict().items())


def test_a_parametrised_weight_cannot_be_set_and_says_so():
    module = nn.utils.parametrizations.weight_norm(linear())
    base = as_base_linear(module)
    base.forward_lora(torch.randn(2, K), *adapters(), 1.0)
    with pytest.raises(RuntimeError, match="remove_parametrizations"):
        base.set_weight(torch.randn(N, K))


def test_what_is_no_base():
    import bitsandbytes as bnb

    attention = nn.MultiheadAttention(8, 2)
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    for module in (nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), attention.out_proj, packed, bnb.nn.Linear4bit(64, 64)):
        assert as_base_linear(module) is None, type(module)


def test_a_kind_can_be_added():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features, self.bias = K, N, None
            self.weight = nn.Parameter(torch.randn(N, K))

    class View(BaseLinear):
        pass

    from pyfastpeft.nn import base_linear

    kinds = list(base_linear._KINDS)
    try:
        register_base_linear(lambda module: isinstance(module, Scaled), View)
        assert type(as_base_linear(Scaled())) is View
    finally:
        base_linear._KINDS[:] = kinds


def test_first_non_finite():
    weight = torch.randn(3, 4, 5)
    assert first_non_finite(weight) is None
    weight[2, 0, 1] = float("nan")
    assert first_non_finite(weight) == (2, 0, 1)
    weight[1, 3, 4] = float("-inf")
    assert first_non_finite(weight.bfloat16()) == (1, 3, 4)
    assert first_non_finite(torch.empty(0, 4)) is None
