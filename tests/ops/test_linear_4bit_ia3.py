"""linear_4bit_ia3: values and gradients against fp64, on the CPU and by the kernels that scale in their epilogue."""

import pytest
import torch
from linear_cases import DTYPES, assert_as_exact_as_torch, run

import pyfastpeft as pf
from pyfastpeft.ops import nf4_matmul_cuda
from pyfastpeft.reference import nf4 as reference_nf4


def _layer(weight):
    return lambda x, scale, bias: torch.nn.functional.linear(x, weight, bias) * scale


def _case(M, N, K, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    q = pf.ops.quantize_4bit(weight.to(device), double_quant=True)
    x, scale, bias = (torch.randn(*s, generator=generator) for s in ((M, K), (N,), (N,)))
    return (
        q,
        [x.to(device, dtype), scale.to(device), bias.to(device)],
        torch.randn(M, N, generator=generator).to(device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, K", [(1, 21, 96), (5, 20, 288), (70, 24, 64), (3, 7, 33)])
def test_values_and_gradients(device, M, N, K, dtype):
    q, tensors, grad = _case(M, N, K, dtype, device)
    tensors[1] = tensors[1].to(dtype if M == 5 else torch.float32)
    flat = [t.cpu() if isinstance(t, torch.Tensor) else t for t in q.flat()[:-1]]
    dense = reference_nf4.dequantize_4bit(*flat, torch.float32)
    on_cpu = [t.cpu() for t in tensors]
    for wanted in ([True, True, True], [True, False, True], [False, True, False]):
        got = run(lambda x, scale, bias: pf.ops.linear_4bit_ia3(x, q, scale, bias), tensors, grad, wanted)
        for tensor, gradient in zip(tensors, got[1:], strict=True):
            assert gradient is None or gradient.dtype == tensor.dtype
        exact = run(_layer(dense.double()), [t.double() for t in on_cpu], grad.cpu().double(), wanted)
        peers = run(_layer(dense.to(dtype)), [t.to(dtype) for t in on_cpu], grad.cpu(), wanted)
        got = [None if t is None else t.cpu() for t in got]
        assert_as_exact_as_torch(got, peers, exact, dtype, ("y", "x", "scale", "bias"))


@pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
@pytest.mark.parametrize("M", [1, 4])
def test_one_rounding(device, M):
    """What the epilogue scales is the fp32 sum: the same as scaling an unrounded result."""
    q, (x, scale, bias), _ = _case(M, 16, 64, torch.bfloat16, device)
    w = nf4_matmul_cuda.Weight(*q.flat()[:7], 16, 64)
    got, _ = nf4_matmul_cuda.forward(w, x, bias, None, None, 1.0, 0.0, None, scale)
    assert torch.equal(got, pf.ops.linear_4bit_ia3(x, q, scale, bias))
    dense = pf.ops.dequantize_4bit(q, torch.float32 if M == 1 else torch.bfloat16)  # matvec does not round weights
    truth = (x.double() @ dense.double().t() + bias.double()) * scale.double()
    assert ((got.double() - truth).abs() <= 2.0**-8 * 1.01 * truth.abs() + 1e-5).all()


def test_any_number_of_dimensions(device):
    q, (x, scale, _), _ = _case(6, 5, 64, torch.float32, device)
    flat = pf.ops.linear_4bit_ia3(x, q, scale)
    assert torch.equal(pf.ops.linear_4bit_ia3(x.view(2, 3, 64), q, scale), flat.view(2, 3, 5))
    assert pf.ops.linear_4bit_ia3(x[:0], q, scale).shape == (0, 5)


def test_keeps_x_only_where_the_scale_is_trained(device):
    q, (x, scale, bias), _ = _case(6, 5, 64, torch.float32, device)
    for trained in (False, True):
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            pf.ops.linear_4bit_ia3(x.detach().requires_grad_(), q, scale.detach().requires_grad_(trained), bias)
        assert (x.data_ptr() in saved) == trained


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"scale": torch.ones(4)}, ValueError, r"linear_4bit_ia3: scale has shape \(4,\), expected \(3,\)"),
        ({"scale": torch.ones(3, dtype=torch.float64)}, TypeError, "linear_4bit_ia3: scale has dtype torch.float64"),
        ({"scale": torch.ones(3, device="meta")}, ValueError, "scale is on meta, x is on cpu"),
        ({"x": torch.ones(2, 63)}, ValueError, "linear_4bit_ia3: x has shape"),
        ({"q": torch.ones(3, 64)}, TypeError, "linear_4bit_ia3: q is a Tensor"),
        ({"bias": torch.ones(2)}, ValueError, r"linear_4bit_ia3: bias has shape \(2,\)"),
    ],
)
def test_bad_input(change, error, message):
    good = {"x": torch.ones(2, 64), "q": pf.ops.quantize_4bit(torch.ones(3, 64)), "scale": torch.ones(3)}
    with pytest.raises(error, match=message):
        pf.ops.linear_4bit_ia3(**{**good, **change})


def test_opcheck():
    q, (x, scale, bias), _ = _case(3, 5, 64, torch.float32, "cpu")
    tensors = [t.requires_grad_() for t in (x, bias, scale)]
    torch.library.opcheck(torch.ops.pyfastpeft.linear_4bit_ia3.default, (tensors[0], *q.flat(), *tensors[1:]))
