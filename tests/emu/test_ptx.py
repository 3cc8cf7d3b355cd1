"""Every shipped kernel's PTX, as nvcc writes it, run by the interpreter of tests/emu/ptx: the asm inside of the kp:: functions
takes part, which the host executor replaces. The op's CPU implementation says what has to come out."""

import re
import shutil

import pytest
import torch
from emu import backend, build, plugin
from emu.ptx import kernels

import pyfastpeft as pf
from pyfastpeft.ops import _cuda, _linear_cuda
from pyfastpeft.reference import lora as reference
from pyfastpeft.reference import segmented_lora as segmented

SEED = torch.tensor([0x1234_5678_9ABC])
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LAUNCHED: set[str] = set()  # plain names of kernels, by all tests of this file

if shutil.which("nvcc") is None:
    pytest.skip("no nvcc on PATH", allow_module_level=True)


@pytest.fixture(scope="module")
def module():
    return plugin.executor()


def _run(module, call, architecture="90a", include=None, capability=None):
    """What `call` gives through the interpreter, and the names of the kernels it launched."""
    with pytest.MonkeyPatch.context() as patch, backend.emulated(module):
        if capability is not None:
            patch.setattr(_cuda, "capability", lambda *args: capability)
        with kernels.interpreted(module, architecture, include) as ran:
            result = call()
    names = [name for name, _, _ in ran]
    LAUNCHED.update(re.split("[<(]", name)[0] for name in names)
    return result, names


def _close(got, exact, tolerance):
    error = (got.double() - exact.double()).square().mean().sqrt()
    size = exact.double().square().mean().sqrt().clamp_min(1e-30)
    assert error <= tolerance * size, f"relative error {error / size:.3g}, allowed {tolerance}"


TOLERANCE = {F32: 2e-6, BF16: 6e-3, F16: 8e-4}


@pytest.mark.parametrize(
    "n, blocksize, dtype, kind",
    [(1002, 64, F32, "nf4"), (1500, 256, BF16, "nf4"), (200, 32, F16, "fp4"), (8200, 4096, BF16, "nf4")],
)
def test_quantise(module, n, blocksize, dtype, kind):
    weight = torch.randn(n).to(dtype)
    want = pf.ops.quantize_4bit(weight, blocksize, kind)
    got, _ = _run(module, lambda: pf.ops.quantize_4bit(weight, blocksize, kind))
    assert torch.equal(got.packed, want.packed) and torch.equal(got.absmax, want.absmax)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("nested", [False, True])
def test_quantise_and_dequantise(module, dtype, nested):
    weight = torch.randn(2100).to(dtype)
    want = pf.ops.quantize_4bit(weight, 64, "nf4", nested)
    got, names = _run(module, lambda: pf.ops.quantize_4bit(weight, 64, "nf4", nested))
    assert torch.equal(got.absmax, want.absmax) and len(names) == 1 + nested
    back, _ = _run(module, lambda: pf.ops.dequantize_4bit(want))
    assert torch.equal(back, pf.ops.dequantize_4bit(want))


def _matrix(N, K, nested=False):
    return pf.ops.quantize_4bit(torch.randn(N, K), 64, "nf4", nested)


@pytest.mark.parametrize(
    "M, N, K, dtype, nested, rank",
    [(1, 9, 96, BF16, True, 0), (2, 5, 64, F32, False, 0), (1, 6, 64, F16, False, 4), (3, 20, 96, BF16, True, 4),
     (17, 8, 64, F16, False, 0), (66, 8, 32, BF16, False, 4), (2, 4, 2080, BF16, True, 0)],
)  # fmt: skip
def test_linear_4bit(module, M, N, K, dtype, nested, rank):
    q, x, bias = _matrix(N, K, nested), torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    a, b = (torch.randn(rank, K), torch.randn(N, rank)) if rank else (None, None)
    got, names = _run(module, lambda: pf.ops.linear_4bit(x, q, bias, a, b, 0.5))
    assert names
    exact = x.double() @ pf.ops.dequantize_4bit(q, F32).double().t() + bias.double()
    if rank:
        exact += 0.5 * x.double() @ a.double().t() @ b.double().t()
    _close(got, exact, 2 * TOLERANCE[dtype])


LORA = [
    ((5, 24, 3), F32, (9, 0)),
    ((33, 40, 17), BF16, (9, 0)),
    ((20, 16, 8), F16, (9, 0)),
    ((9, 20, 5), BF16, (7, 5)),
    ((131, 520, 4), BF16, (9, 0)),
]


@pytest.mark.parametrize("shape, dtype, capability", LORA)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_low_rank_products(module, shape, dtype, capability, p):
    M, D, R = shape
    x, a, s = torch.randn(M, D).to(dtype), torch.randn(R, D), torch.randn(M, R)
    dropped = reference.dropout(x.double(), p, int(SEED)) if p else x.double()
    got, _ = _run(module, lambda: _linear_cuda.shrink(x, a, 1.5, p, SEED), capability=capability)
    _close(got, 1.5 * dropped @ a.double().t(), TOLERANCE[dtype])
    got, _ = _run(module, lambda: _linear_cuda.accumulate(s, x, p, SEED), capability=capability)
    _close(got, s.double().t() @ dropped, TOLERANCE[dtype])
    path = s.double() @ a.double()
    path = reference.dropout(path, p, int(SEED)) if p else path
    y = torch.empty(M, D, dtype=dtype)
    got, _ = _run(module, lambda: _linear_cuda.expand_(y, s, a, p, SEED, add=False), capability=capability)
    _close(got, path, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    "K, N, dtype, own", [(37, 21, F32, False), (296, 40, BF16, False), (40, 264, F16, True), (21, 9, BF16, True)]
)
def test_segmented_lora(module, K, N, dtype, own):
    x, y, ranks = torch.randn(4, 3, K).to(dtype), torch.randn(4, 3, N).to(dtype), (5, 20)
    factors = dtype if own else F32
    a, b = [torch.randn(r, K).to(factors) / 4 for r in ranks], [torch.randn(N, r).to(factors) / 4 for r in ranks]
    order, starts = pf.ops.segments(torch.tensor([1, -1, 0, 1]), 2)
    bias, scalings = [torch.randn(N), None], [0.5, 2.0]
    got, names = _run(module, lambda: pf.ops.segmented_lora(y.clone(), x, order, starts, a, b, bias, scalings))
    assert len(names) == 2
    exact = [[None if t is None else t.double() for t in group] for group in (a, b, bias)]
    _close(got, segmented.segmented_lora(y.double(), x.double(), order, starts, *exact, scalings), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    "K, N, dtype, own", [(37, 21, F32, False), (72, 40, BF16, False), (40, 136, F16, True), (21, 9, BF16, True)]
)
def test_segmented_lora_backward(module, K, N, dtype, own):
    x, y, ranks = torch.randn(4, 3, K).to(dtype), torch.randn(4, 3, N).to(dtype), (5, 20)
    factors = dtype if own else F32
    a, b = [torch.randn(r, K).to(factors) / 4 for r in ranks], [torch.randn(N, r).to(factors) / 4 for r in ranks]
    order, starts = pf.ops.segments(torch.tensor([1, -1, 0, 1]), 2)
    bias, cotangent = torch.randn(N), torch.randn(4, 3, N).to(dtype)

    def gradients(function, wide=False):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (x, *a, *b, bias)]
        out = function(
            y.to(leaves[0]), leaves[0], order, starts, leaves[1:3], leaves[3:5], [leaves[5], None], [0.5, 2.0]
        )
        return torch.autograd.grad(out, leaves, cotangent.to(out))

    got, names = _run(module, lambda: gradients(pf.ops.segmented_lora))
    assert len(names) == 4
    for ours, theirs in zip(got, gradients(segmented.segmented_lora, wide=True), strict=True):
        _close(ours, theirs, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("rows, dtype", [(5, F32), (4097, BF16), (4, F16)])
def test_ia3(module, rows, dtype):
    x, scale = torch.randn(rows, 24).to(dtype), torch.randn(24)
    want = pf.ops.ia3_scale(x, scale)
    got, _ = _run(module, lambda: pf.ops.ia3_scale(x, scale))
    assert torch.equal(got, want)

    def gradients():
        leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
        return torch.autograd.grad(pf.ops.ia3_scale(*leaves).float().square().sum(), leaves)

    for ours, theirs in zip(_run(module, gradients)[0], gradients(), strict=True):
        _close(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bits", [32, 8])
def test_adamw(module, dtype, bits):
    from pyfastpeft.reference.adamw import dynamic_map

    def step():
        generator = torch.Generator().manual_seed(1)
        sizes = [300, 7]
        p, g = ([torch.randn(n, generator=generator).to(dtype) for n in sizes] for _ in range(2))
        steps = [torch.zeros(()) for _ in sizes]
        if bits == 32:
            m, v, further = *([torch.zeros(n) for n in sizes] for _ in range(2)), {}
        else:
            signed, unsigned = dynamic_map(True), dynamic_map(False)
            m = [torch.full((n,), int(signed.abs().argmin()), dtype=torch.uint8) for n in sizes]
            v = [torch.full((n,), int(unsigned.abs().argmin()), dtype=torch.uint8) for n in sizes]
            absmax = [[torch.zeros(-(-n // 256)) for n in sizes] for _ in range(2)]
            further = {"absmax1": absmax[0], "absmax2": absmax[1], "state_bits": 8, "qmap1": signed, "qmap2": unsigned}
        for _ in range(2):
            pf.ops.adamw_(p, g, m, v, steps, lr=1e-2, **further)
        return [*p, *m, *v, *steps]

    got, names = _run(module, step)
    assert names
    for ours, theirs in zip(got, step(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("file", build.kernel_sources(), ids=lambda f: f.stem)
def test_tensor_core_kernels_use_tensor_cores(file):
    """Their names say so; and no kernel falls back to local memory for what ought to be registers."""
    ptx, names = kernels.module_of(file, "90a")
    for name, mangled in names.items():
        body = ptx.kernels[mangled][1]
        is_mma = "_mma_kernel" in name or name.startswith("nf4_matmul_kernel")
        assert is_mma == ("mma.sync.aligned.m16n8k16" in body), name
        assert not re.search(r"\b(ld|st)\.local\b", body), name


def test_every_kernel_was_run(request):
    """The tests above, if they all ran, launched every kernel that is in a .cu file."""
    chosen = {item.originalname for item in request.session.items if item.path == request.path}
    written = set(re.findall(r"^def (test_\w+)", request.path.read_text(encoding="utf-8"), re.M))
    if chosen == written:
        names = [name for file in build.kernel_sources() for name in kernels.module_of(file, "90a")[1]]
        assert {re.split("[<(]", name)[0] for name in names} - LAUNCHED == set()
