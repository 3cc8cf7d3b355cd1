"""segmented_lora on every device: each sample of a batch with an adapter of its own, of any rank, or none."""

import pytest
import torch

import pyfastpeft as pf
from pyfastpeft.ops import _cuda
from pyfastpeft.reference.segmented_lora import segmented_lora as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# adapter of each sample, rows of a sample, K, N, ranks: one of everything; a decoding step; tails of tiles, of ranks and
# of columns; several tiles of rows; rank 0 and adapters that no sample has; more columns than a turn; many samples
CASES = [
    ([0], 1, 1, 1, [1]),
    ([0, 1, 0, -1, 2], 1, 64, 72, [4, 16, 2]),
    ([1, -1, 0, 1, 1], 3, 37, 21, [3, 20]),
    ([0, 1], 35, 24, 40, [7, 18]),
    ([2, 2, 0], 2, 40, 264, [0, 5, 33]),
    ([1, 0, 1], 5, 264, 16, [17, 8]),
    ([-1, -1], 2, 16, 16, [2]),
    ([0, 2, 1, 0, 2, 0, 1, 0, 0, 0, 2], 1, 1032, 8, [8, 64, 12]),
]
TOLERANCE = {F32: 3e-6, BF16: 1.2e-2, F16: 1.6e-3}


def _case(case, dtype, factor_dtype=F32, bias=True, seed=0):
    adapters, rows, K, N, ranks = case
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x = torch.nn.functional.gelu(randn(len(adapters), rows, K))
    y = randn(len(adapters), rows, N)
    a = [(randn(r, K) / K**0.5).to(factor_dtype) for r in ranks]
    b = [(randn(N, r) / max(r, 1) ** 0.5).to(factor_dtype) for r in ranks]
    biases = [randn(N) if bias and i % 2 == 0 else None for i in range(len(ranks))]
    scalings = [0.5 * (i + 1) for i in range(len(ranks))]
    return y.to(dtype), x.to(dtype), torch.tensor(adapters), a, b, biases, scalings


def _run(case, device, dtype, factor_dtype=F32, bias=True):
    y, x, adapters, a, b, biases, scalings = _case(case, dtype, factor_dtype, bias)
    exact = reference(
        y.double(), x.double(), *pf.ops.segments(adapters, len(a)), *([t if t is None else t.double() for t in group]
        for group in (a, b, biases)), scalings,
    )  # fmt: skip
    order, starts = pf.ops.segments(adapters.to(device), len(a))
    a, b, biases = ([t if t is None else t.to(device) for t in group] for group in (a, b, biases))
    given = y.to(device).clone()  # on the CPU .to() is no copy
    got = pf.ops.segmented_lora(given, x.to(device), order, starts, a, b, biases, scalings)
    assert got.data_ptr() == given.data_ptr()
    got = got.cpu()
    untouched = [i for i, n in enumerate(adapters.tolist()) if n < 0]
    assert torch.equal(got[untouched], y[untouched])
    error = (got.double() - exact).square().mean().sqrt()
    assert error <= TOLERANCE[dtype] * exact.square().mean().sqrt().clamp_min(1), f"error {error:.3g}"
    return got


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case[0])}x{case[1]} {case[2]}-{case[3]}")
@pytest.mark.parametrize("dtype, factors", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)])
def test_against_the_reference(case, dtype, factors, device):
    _run(case, device, dtype, factors)


@pytest.mark.parametrize("case", CASES[1:4])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_without_tensor_cores(case, dtype, device, monkeypatch):
    monkeypatch.setattr(_cuda, "capability", lambda tensor: (7, 5))
    _run(case, device, dtype, bias=False)
    _run(case, device, dtype, dtype, bias=False)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_more_adapters_than_a_launch_takes(device, dtype):
    ranks = [1 + i % 3 for i in range(115)]
    adapters = [114, 3, -1, 112, 111, 0]
    _run((adapters, 1, 16, 16, ranks), device, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_instruction_sets_and_threads(dtype, isa):
    threads = torch.get_num_threads()
    try:
        for case in CASES:
            torch.set_num_threads(2)
            parallel = _run(case, "cpu", dtype)
            torch.set_num_threads(1)
            assert torch.equal(parallel, _run(case, "cpu", dtype))
    finally:
        torch.set_num_threads(threads)


def test_the_same_bits_for_a_sample_whatever_else_is_in_the_batch(device):
    """Its rows' sums run along K and the ranks alone."""
    y, x, _, a, b, biases, scalings = _case(([0, 1, 0, 1], 1, 48, 40, [4, 6]), BF16)
    a, b, biases = ([t if t is None else t.to(device) for t in group] for group in (a, b, biases))

    def run(adapters):
        order, starts = pf.ops.segments(torch.tensor(adapters, device=str(device)), 2)
        return pf.ops.segmented_lora(y.to(device).clone(), x.to(device), order, starts, a, b, biases, scalings)

    whole, other = run([0, 1, 0, 1]), run([0, 1, 1, -1])
    assert torch.equal(whole[:2], other[:2])


def test_strided_inputs_and_several_dimensions(device):
    y, x, adapters, a, b, biases, scalings = _case(([1, 0], 6, 16, 8, [3, 5]), F32)
    order, starts = pf.ops.segments(adapters.to(device), 2)
    exact = reference(y, x, order.cpu(), starts.cpu(), a, b, biases, scalings)
    wide = torch.cat([x, x], dim=2).to(device)[:, :, :16].view(2, 2, 3, 16)
    factors = [[t.t().contiguous().t().to(device) for t in group] for group in (a, b)]
    biases = [None if t is None else t.to(device) for t in biases]
    got = pf.ops.segmented_lora(y.to(device).clone().view(2, 2, 3, 8), wide, order, starts, *factors, biases, scalings)
    torch.testing.assert_close(got.cpu().view_as(exact), exact)


def test_misaligned_memory(device):
    """Tensors that begin two bytes into their memory take the kernels without vectors."""
    y, x, adapters, a, b, _, scalings = _case(([1, 0, 1], 2, 32, 16, [3, 5]), BF16)
    order, starts = pf.ops.segments(adapters.to(device), 2)
    exact = reference(y.double(), x.double(), order.cpu(), starts.cpu(), a, b, [None] * 2, scalings)

    def shifted(t):
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=str(device))
        memory[1:] = t.reshape(-1).to(device)
        return memory[1:].view(t.shape)

    got = pf.ops.segmented_lora(shifted(y), shifted(x), order, starts, [shifted(t) for t in a],
                                [shifted(t) for t in b], None, scalings)  # fmt: skip
    assert (got.cpu().double() - exact).norm() <= 1e-2 * exact.norm()


def test_no_samples_and_no_adapters(device):
    y, x = torch.ones(0, 3, 4, device=str(device)), torch.ones(0, 3, 8, device=str(device))
    order, starts = pf.ops.segments(torch.zeros(0, dtype=torch.int64, device=str(device)), 1)
    a, b = torch.ones(2, 8, device=str(device)), torch.ones(4, 2, device=str(device))
    assert pf.ops.segmented_lora(y, x, order, starts, [a], [b]).shape == (0, 3, 4)
    y, x = torch.ones(2, 4, device=str(device)), torch.ones(2, 8, device=str(device))
    order, starts = pf.ops.segments(torch.tensor([-1, -1], device=str(device)), 0)
    assert torch.equal(pf.ops.segmented_lora(y.clone(), x, order, starts, [], []), y)


def test_fake_tensors_compile_and_version_counters():
    y, x, adapters, a, b, biases, scalings = _case(CASES[1], F32)
    order, starts = pf.ops.segments(adapters, 3)
    expected = pf.ops.segmented_lora(y.clone(), x, order, starts, a, b, biases, scalings)
    counters = torch._dynamo.utils.counters

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(y, x, adapters):
        order, starts = pf.ops.segments(adapters, 3)
        return pf.ops.segmented_lora(y * 1, x, order, starts, a, b, biases, scalings)

    torch._dynamo.reset()
    counters.clear()
    torch.testing.assert_close(f(y, x, adapters), expected)
    f(y, x, adapters.flip(0))  # another composition is no new graph
    assert counters["stats"]["unique_graphs"] == 1
    before = y._version
    pf.ops.segmented_lora(y, x, order, starts, a, b, biases, scalings)
    assert y._version > before


def test_bad_input(device):
    y, x, adapters, a, b, biases, scalings = _case(([1, 0, 1], 2, 8, 4, [2, 3]), F32)
    y, x, adapters = y.to(device), x.to(device), adapters.to(device)
    a, b, biases = ([t if t is None else t.to(device) for t in group] for group in (a, b, biases))
    order, starts = pf.ops.segments(adapters, 2)

    def run(y=y, x=x, order=order, starts=starts, a=a, b=b, biases=biases, scalings=scalings):
        return pf.ops.segmented_lora(y.clone(), x, order, starts, a, b, biases, scalings)

    run()
    with pytest.raises(TypeError, match="y is torch.float32 and x is torch.bfloat16"):
        run(x=x.bfloat16())
    with pytest.raises(TypeError, match="x has dtype torch.int64"):
        run(x=x.long(), y=y.long())
    with pytest.raises(ValueError, match=r"x has shape \(3, 8\)"):
        run(x=x[:, 0])
    with pytest.raises(TypeError, match="order is torch.int64"):
        run(order=order.long())
    with pytest.raises(ValueError, match="order has 2 entries and starts 3, expected 3"):
        run(order=order[:2])
    with pytest.raises(ValueError, match="starts 2, expected 3, as many as samples, and 3"):
        run(starts=starts[:2])
    with pytest.raises(ValueError, match="2 lora_a, 1 lora_b"):
        run(b=b[:1])
    with pytest.raises(ValueError, match=r"lora_a\[1\] has shape \(3, 7\)"):
        run(a=[a[0], a[1][:, :7]])
    with pytest.raises(ValueError, match=r"lora_bias\[0\] has shape \(3,\), expected \(4,\)"):
        run(biases=[biases[0][:3], None])
    with pytest.raises(TypeError, match="segments: adapters is torch.float32"):
        pf.ops.segments(torch.ones(2), 1)


def test_what_order_and_starts_say_is_checked_on_the_cpu():
    y, x, _, a, b, biases, scalings = _case(([1, 0, 1], 2, 8, 4, [2, 3]), F32)

    def run(order, starts):
        ints = [torch.tensor(values, dtype=torch.int32) for values in (order, starts)]
        return pf.ops.segmented_lora(y.clone(), x, *ints, a, b, biases, scalings)

    run([2, 0, 1], [0, 1, 3])
    with pytest.raises(ValueError, match=r"order\[0\] is 3, expected 0 to 2"):
        run([3, 0, 1], [0, 1, 3])
    with pytest.raises(ValueError, match="sample 1 is twice in order"):
        run([1, 0, 1], [0, 1, 3])
    with pytest.raises(ValueError, match=r"starts\[2\] is 4, expected rising numbers from 0 to 3"):
        run([0, 1, 2], [0, 1, 4])
    with pytest.raises(ValueError, match=r"starts\[1\] is -1"):
        run([0, 1, 2], [0, -1, 3])


@pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_wrong_numbers_on_the_device_never_leave_the_tensors(dtype, device):
    """They cannot be looked at without waiting for it: what is not there is left out."""
    y, x, _, a, b, biases, scalings = _case(([1, 0, 1], 2, 8, 8, [2, 3]), dtype)
    for order, starts in (
        ([7, 0, -1], [0, 1, 3]),
        ([0, 1, 2], [0, 1, 900]),
        ([0, 1, 2], [-5, 1, 3]),
        ([0, 1, 2], [3, 2, 1]),
    ):
        ints = [torch.tensor(values, dtype=torch.int32, device=str(device)) for values in (order, starts)]
        got = pf.ops.segmented_lora(y.to(device).clone(), x.to(device), *ints, *([t if t is None else t.to(device)
            for t in group] for group in (a, b, biases)), scalings)  # fmt: skip
        assert torch.isfinite(got).all()


@pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
def test_the_binding_refuses_wrong_sizes(device):
    x = torch.ones(2, 8, device=str(device))
    kernels, index, stream = _cuda.target(x, "test")
    ints = torch.zeros(3, dtype=torch.int32, device=str(device))
    space = kernels.segmented_lora_workspace(2, 8, 1, 1)
    workspace = torch.zeros(space, device=str(device))

    def run(factors=0, a=None, ranks=(1,), space=space, samples=2, dtype=0):
        p = x.data_ptr()
        kernels.segmented_lora_cuda(
            p, x.clone().data_ptr(), dtype, 8, 8, ints.data_ptr(), samples, ints.data_ptr(), 1, [p] if a is None else a,
            [p], [0], list(ranks), [1.0], factors, True, workspace.data_ptr(), space, index, stream,
        )  # fmt: skip

    run()
    with pytest.raises(ValueError, match="factors of dtype code 2, expected 0 .float32. or x's, 0"):
        run(factors=2)
    with pytest.raises(ValueError, match="lora_a has no memory"):
        run(a=[0])
    with pytest.raises(ValueError, match="2 addresses of A, 1 of B"):
        run(a=[1, 2])
    with pytest.raises(ValueError, match="workspace has 1 values"):
        run(space=1)
    with pytest.raises(ValueError, match="rank -1 of adapter 0"):
        run(ranks=(-1,))
    with pytest.raises(ValueError, match="expected less than 2.31 rows"):
        run(samples=2**31)
    with pytest.raises(ValueError, match="dtype code is 7"):
        run(dtype=7)
