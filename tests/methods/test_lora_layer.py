"""LoraLinear alone: the formula, dropout, dtypes, torch.compile."""

import copy
import math

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from pyfastpeft.methods.lora.layer import LoraLinear, draw_weights

transformers = pytest.importorskip("transformers")
BASES = ["linear", "conv1d", "nf4"]


def layer(kind="linear", k=24, n=20, rank=3, dropout=0.0, dtype=torch.float32, seed=0, **config):
    torch.manual_seed(seed)
    base = nn.Linear(k, n, dtype=dtype)
    if kind == "conv1d":
        base = transformers.pytorch_utils.Conv1D(n, k).to(dtype)
    elif kind == "nf4":
        base = pf.nn.NF4Linear.from_linear(base)
    module = LoraLinear(base.requires_grad_(False))
    module.add_adapter(
        "a", pf.LoraConfig(r=rank, lora_alpha=5, lora_dropout=dropout, **config), "", fp32=True, init=True
    )
    module.activate(["a"], trainable=True)
    with torch.no_grad():
        module.lora_B["a"].weight.normal_()
    return module


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_formula_and_its_gradients(kind, dtype):
    module = layer(kind, dtype=dtype)
    x = torch.randn(2, 5, 24).to(dtype).requires_grad_()
    a, b = module.lora_A["a"].weight, module.lora_B["a"].weight
    w, bias = module.base.get_weight().double(), module.bias.double()
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    truth = exact[0] @ w.T + bias + 5 / 3 * (exact[0] @ exact[1].T) @ exact[2].T
    peer_in = [t.detach().to(dtype).requires_grad_() for t in (x, a, b)]
    peer = peer_in[0] @ w.to(dtype).T + bias.to(dtype) + 5 / 3 * (peer_in[0] @ peer_in[1].T) @ peer_in[2].T
    y = module(x)
    assert y.dtype == dtype and y.shape == (2, 5, 20)
    grad = torch.randn(2, 5, 20).to(dtype)
    truth.backward(grad.double()), peer.backward(grad), y.backward(grad)
    for got, theirs, right in [
        (y, peer, truth),
        *((o.grad, p.grad, e.grad) for o, p, e in zip((x, a, b), peer_in, exact, strict=True)),
    ]:
        error, allowed = ((t.double() - right).norm() for t in (got, theirs))
        assert error <= 2 * allowed + 1e-6 * right.norm()


@pytest.mark.parametrize("kind", BASES)
def test_dropout_acts_in_training_only_with_the_right_mean_and_rate(kind):
    module = layer(kind, k=64, n=64, rank=64, dropout=0.25)
    with torch.no_grad():
        module.lora_A["a"].weight.copy_(torch.eye(64)), module.lora_B["a"].weight.copy_(torch.eye(64))
    x = torch.ones(500, 64)
    base = module.base_layer(x)
    scale = module.scaling["a"]
    kept = (module.train()(x) - base) / scale
    assert ((kept.abs() < 1e-4) | ((kept - 4 / 3).abs() < 1e-4)).all()
    assert abs((kept > 0.5).float().mean().item() - 0.75) < 0.01
    torch.testing.assert_close((module.eval()(x) - base) / scale, torch.ones(500, 64), rtol=1e-4, atol=1e-4)
    module.train()
    torch.manual_seed(4)
    first = module(x)
    assert not torch.equal(module(x), first)
    torch.manual_seed(4)
    assert torch.equal(module(x), first)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initial_values(init):
    torch.manual_seed(0)
    a, b = draw_weights(400, 300, 50, init)
    if init == "gaussian":
        assert abs(a.std().item() - 1 / 50) < 2e-4
    else:  # kaiming_uniform(a=sqrt(5)): uniform within ±1/sqrt(K)
        assert a.abs().max() <= 1 / math.sqrt(400) and abs(a.std().item() - 1 / math.sqrt(3 * 400)) < 5e-4
    assert b.any().item() is (init is False)


@pytest.mark.parametrize("kind", BASES)
def test_compiles_whole_with_dropout_and_does_not_recompile(kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    module = layer(kind, dropout=0.3).train()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for _ in range(4):
        x = torch.randn(6, 24, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
    assert not torch.equal(compiled(x), compiled(x))  # every step draws a mask of its own
    assert backend.frame_count == 1
    assert module.lora_A["a"].weight.grad.norm() > 0
    module.eval()
    torch.testing.assert_close(compiled(x), module(x))
    torch._dynamo.reset()


def test_several_adapters_compile():
    torch._dynamo.reset()
    module = layer()
    module.add_adapter("b", pf.LoraConfig(r=2), "", fp32=True, init=False)
    with torch.no_grad():
        module.lora_A["b"].weight.normal_(), module.lora_B["b"].weight.normal_()
    module.activate(["a", "b"], trainable=True)
    x = torch.randn(4, 24)
    expected = x @ (module.weight + module.get_delta_weight("a") + module.get_delta_weight("b")).T + module.bias
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", BASES)
def test_autocast(kind):
    module = layer(kind)
    x = torch.randn(4, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and module.lora_A["a"].weight.grad.dtype == torch.float32


def test_a_base_that_is_put_in_place_later_is_seen():
    module = layer()
    twin = copy.deepcopy(module)
    twin.base_layer = nn.Linear(24, 20)
    x = torch.randn(2, 24)
    delta = module(x) - module.base_layer(x)
    torch.testing.assert_close(twin(x), twin.base_layer(x) + delta, rtol=1e-4, atol=1e-5)


def test_hooks_on_the_base_are_called():
    module = layer()
    x = torch.randn(2, 24)
    before = module(x)
    module.base_layer.register_forward_hook(lambda m, i, o: o + 1)
    torch.testing.assert_close(module(x), before + 1)


def test_empty_input_and_wrong_width():
    module = layer()
    assert module(torch.zeros(0, 24)).shape == (0, 20)
    with pytest.raises((ValueError, RuntimeError), match="23"):
        module(torch.zeros(2, 23))


def test_a_meta_model_gets_meta_adapters():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4, 4))
    model = pf.get_peft_model(base, pf.LoraConfig(target_modules=["0"]))
    assert all(p.is_meta for p in model.parameters())
