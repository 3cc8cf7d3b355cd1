"""The kernels on random schedules: threads and blocks in any order, interrupted in the middle. The same bits every time."""

import pytest
import torch
from emu import backend, plugin

import pyfastpeft as pf


def _randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _gradients(y, inputs):
    return [y, *torch.autograd.grad(y.float().sum(), inputs)]


def _quantise(dtype):
    q = pf.ops.quantize_4bit(_randn(3, 611, dtype=dtype), 32, double_quant=True)
    return [q.packed, q.absmax, q.nested_absmax, q.offset, pf.ops.dequantize_4bit(q)]


def _layer(dtype, M, N, K, R):
    x = _randn(M, K, dtype=dtype, seed=1).requires_grad_()
    a, b = _randn(R, K, seed=2).requires_grad_(), _randn(N, R, seed=3).requires_grad_()
    return x, _randn(N, dtype=dtype, seed=4).requires_grad_(), a, b


def _linear_lora(dtype, M, K):
    x, bias, a, b = _layer(dtype, M, 40, K, 5)
    y = pf.ops.linear_lora(x, _randn(40, K, dtype=dtype), bias, a, b, 2.0, 0.3, torch.tensor(7))
    return _gradients(y, (x, bias, a, b))


def _linear_4bit(dtype, M, N=40, K=192):
    x, bias, a, b = _layer(dtype, M, N, K, 5)
    q = pf.ops.quantize_4bit(_randn(N, K), 64, double_quant=True)
    return _gradients(pf.ops.linear_4bit(x, q, bias, a, b, 2.0), (x, bias, a, b))


def _ia3_scale(dtype, M, D):
    x, scale = _randn(M, D, dtype=dtype, seed=1).requires_grad_(), _randn(D, seed=2).requires_grad_()
    return _gradients(pf.ops.ia3_scale(x, scale), (x, scale))


def _adamw(dtype, bits):
    sizes = (4099, 300, 1)
    params = [torch.nn.Parameter(_randn(n, dtype=dtype, seed=n)) for n in sizes]
    optimizer = pf.optim.AdamW(params, lr=1e-2, state_bits=bits)
    for step in range(2):
        for p in params:
            p.grad = _randn(p.numel(), dtype=dtype, seed=10 + step)
        optimizer.step()
    return [p.detach() for p in params]


CALLS = {
    "quantise": _quantise,
    "linear_lora": lambda dtype: _linear_lora(dtype, 35, 72),
    "linear_lora, sums in parts": lambda dtype: _linear_lora(dtype, 40, 520),
    "linear_4bit of a row": lambda dtype: _linear_4bit(dtype, 1),
    "linear_4bit of some rows": lambda dtype: _linear_4bit(dtype, 19),
    "linear_4bit of many rows": lambda dtype: _linear_4bit(dtype, 70),
    "linear_4bit, sums in parts": lambda dtype: _linear_4bit(dtype, 5, 8, 2112),
    "ia3_scale": lambda dtype: _ia3_scale(dtype, 35, 70),
    "ia3_scale, sums in parts": lambda dtype: _ia3_scale(dtype, 2100, 2),
    "adamw": lambda dtype: _adamw(dtype, 32),
    "adamw of 8 bits": lambda dtype: _adamw(dtype, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_same_bits_on_every_schedule(name, dtype):
    module = plugin.executor()
    results = []
    for seed, preempt in ((0, 0), (1, 50), (2, 3)):
        with backend.emulated(module, seed, preempt):
            results.append(CALLS[name](dtype))
    for other in results[1:]:
        for i, (expected, got) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(expected, got), f"result {i} depends on the order of threads"
