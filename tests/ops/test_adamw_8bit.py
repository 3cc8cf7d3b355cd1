"""adamw_ with 8-bit state: the maps are bitsandbytes', the codes bit for bit the reference's."""

import hashlib

import bitsandbytes
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import pyfastpeft as pf
from pyfastpeft.reference import adamw as reference
from pyfastpeft.reference.nf4 import dynamic_map

SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)


def _state(n):
    blocks = -(n // -256)
    codes = [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]
    return *codes, torch.zeros(blocks), torch.zeros(blocks)


def _step(p, g, state, step, **options):
    s1, s2, a1, a2 = state
    pf.ops.adamw_([p], [g], [s1], [s2], [step], [a1], [a2], state_bits=8, **{"lr": 1e-2, **options})


def _same(got, expected):
    return torch.equal(got.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


@pytest.mark.parametrize(
    ("signed", "digest"), [(True, "e732639a65f497b4"), (False, "305f002cc11278fb")], ids=["signed", "unsigned"]
)
def test_maps_are_bitsandbytes(signed, digest):
    ours = dynamic_map(signed)
    assert hashlib.sha256(ours.numpy().tobytes()).hexdigest().startswith(digest)
    assert torch.equal(ours, bitsandbytes.functional.create_dynamic_map(signed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 4096, 10_001])
def test_equals_the_reference(n, dtype, isa):
    torch.manual_seed(n)
    p = torch.randn(n).to(dtype)
    state, step = _state(n), torch.zeros(())
    expected = (p.float().clone(), *_state(n))
    for t in range(1, 6):
        g = (torch.randn(n) * 10.0 ** torch.randint(-6, 3, (n,))).to(dtype)
        _step(p, g, state, step)
        expected = reference.adamw_step_8bit(expected[0], g, *expected[1:], t, lr=1e-2)
        expected = (expected[0].to(dtype).float(), *expected[1:])
        assert torch.equal(p.float(), expected[0])
        for got, want in zip(state, expected[1:], strict=True):
            assert torch.equal(got, want), (t, (got != want).nonzero()[:5].tolist())


def _encode(values):
    """Runs `values` (one block at least) through the kernel's encoder as first moments: beta1 = 0, grad = values."""
    n = values.numel()
    state = _state(n)
    _step(torch.zeros(n), values, state, torch.zeros(()), beta1=0.0, weight_decay=0.0)
    return state


def _neighbours(values):
    up = torch.nextafter(values, torch.tensor(float("inf")))
    down = torch.nextafter(values, torch.tensor(float("-inf")))
    return torch.cat([values, up, down])


def test_nearest_on_and_around_every_level_and_midpoint(isa):
    """absmax is 1, so the scaled value is the value: midpoints that fp32 holds are ties and go to the lower code."""
    for qmap, moment in ((SIGNED, 0), (UNSIGNED, 1)):
        middle = (qmap[:-1].double() + qmap[1:].double()) / 2
        probes = _neighbours(torch.cat([qmap, middle.float()])).clamp(-1, 1)
        if moment == 1:  # second moments: v = g², so the probes are what squares give
            probes = probes.clamp(min=0).sqrt()
        probes = torch.nn.functional.pad(probes, (0, -probes.numel() % 255)).reshape(-1, 255)
        probes = torch.cat([torch.ones(len(probes), 1), probes], 1).reshape(-1)
        state = _encode(probes) if moment == 0 else _encode_second(probes)
        values = probes if moment == 0 else probes * probes
        assert torch.equal(state[moment], reference.quantize_moment(values, qmap)[0])
        distance = (qmap.double() - values.double().unsqueeze(1)).abs()
        assert torch.equal(state[moment].long(), distance.argmin(1))  # argmin: the first of equals


def _encode_second(values):
    n = values.numel()
    state = _state(n)
    _step(torch.zeros(n), values, state, torch.zeros(()), beta2=0.0, weight_decay=0.0)
    return state


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 700), exponent=st.integers(-44, 18), zeros=st.floats(0, 1))
def test_codes_of_any_moments(seed, n, exponent, zeros):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10.0**exponent
    values[torch.rand(n, generator=generator) < zeros] = 0
    codes, _, absmax, _ = _encode(values)
    expected_codes, expected_absmax = reference.quantize_moment(values, SIGNED)
    assert torch.equal(codes, expected_codes) and torch.equal(absmax, expected_absmax)
    if exponent > -30:
        back = reference.dequantize_moment(codes, absmax, SIGNED)
        scale = absmax.repeat_interleave(256)[:n]
        assert ((back - values).abs() <= 0.0072 * scale).all()  # half the widest gap of the signed map


@pytest.mark.parametrize("largest", [1e-45, 1e-42, 2.9e-39, 1.17e-38, 1.18e-38])
def test_subnormal_moments(largest, isa):
    """The reciprocal of a small subnormal absmax overflows; its block is divided instead."""
    values = torch.linspace(-1, 1, 700) * largest
    codes, _, absmax, _ = _encode(values)
    expected_codes, expected_absmax = reference.quantize_moment(values, SIGNED)
    assert torch.equal(codes, expected_codes) and torch.equal(absmax, expected_absmax)
    assert codes[0] == 0 and codes[-1] == 255


def test_every_code_round_trips(isa):
    codes = torch.arange(256).to(torch.uint8)
    for moment in (0, 1):
        state = list(_state(256))
        state[moment], state[2 + moment] = codes.clone(), torch.ones(1)
        options = {"beta1": 1.0, "beta2": 1.0}  # the moments stay what they are
        _step(torch.zeros(256), torch.zeros(256), state, torch.zeros(()), lr=0.0, weight_decay=0.0, **options)
        assert torch.equal(state[moment], codes) and state[2 + moment] == 1, moment


def test_same_bits_on_every_thread_count(isa):
    former = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            p, g, state = torch.randn(100_001), torch.randn(100_001), _state(100_001)
            for _ in range(3):
                _step(p, g, state, torch.zeros(()))
            results.append([p, *state])
    finally:
        torch.set_num_threads(former)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_mixed_with_fp32_state_in_one_call(isa):
    torch.manual_seed(0)
    params, grads = [torch.randn(5000), torch.randn(30)], [torch.randn(5000), torch.randn(30)]
    alone = [p.clone() for p in params]
    s1, s2, a1, a2 = _state(5000)
    none = torch.empty(0)
    steps = [torch.zeros(()), torch.zeros(())]
    m, v = [s1, torch.zeros(30)], [s2, torch.zeros(30)]
    pf.ops.adamw_(params, grads, m, v, steps, [a1, none], [a2, none], lr=1e-2, state_bits=8)
    _step(alone[0], grads[0], _state(5000), torch.zeros(()))
    pf.ops.adamw_([alone[1]], [grads[1]], [torch.zeros(30)], [torch.zeros(30)], [torch.zeros(())], lr=1e-2)
    assert torch.equal(params[0], alone[0]) and torch.equal(params[1], alone[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_meets_nan_or_infinity_becomes_nan(bad, isa):
    p, g, state, step = torch.zeros(600), torch.ones(600), _state(600), torch.zeros(())
    g[300] = bad
    _step(p, g, state, step)
    assert p.isnan().nonzero().tolist() == [[300]]
    assert state[2].isnan().tolist() == state[3].isnan().tolist() == [False, True, False]
    _step(p, torch.ones(600), state, step)
    assert torch.equal(p.isnan().nonzero().flatten(), torch.arange(256, 512))


def test_a_map_of_ones_own(isa):
    """A loaded map is trusted, even one unlike the dynamic maps."""
    qmap1, qmap2 = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256) ** 3
    torch.manual_seed(0)
    p, g, state = torch.randn(700), torch.randn(700), _state(700)
    expected = reference.adamw_step_8bit(p.clone(), g, *_state(700), 1, qmap1, qmap2, lr=1e-2)
    _step(p, g, state, torch.zeros(()), qmap1=qmap1, qmap2=qmap2)
    assert torch.equal(p, expected[0]) and all(torch.equal(a, b) for a, b in zip(state, expected[1:], strict=True))
    with pytest.raises(ValueError, match=r"qmap1\[1\] is .*, expected 256 ascending levels"):
        _step(p, g, state, torch.zeros(()), qmap1=qmap1.flip(0))


def test_follows_fp32_state_as_closely_as_bitsandbytes():
    torch.manual_seed(0)
    n = 4096
    start = torch.randn(n)
    ours, exact, theirs = start.clone(), start.clone(), torch.nn.Parameter(start.clone())
    peer = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.01)
    state, step = _state(n), torch.zeros(())
    m, v, exact_step = torch.zeros(n), torch.zeros(n), torch.zeros(())
    for _ in range(30):
        g = torch.randn(n) * 0.1 + start
        theirs.grad = g.clone()
        peer.step()
        _step(ours, g, state, step)
        pf.ops.adamw_([exact], [g], [m], [v], [exact_step], lr=1e-2)
    assert (ours - exact).norm() <= 1.05 * (theirs.detach() - exact).norm()


def test_opcheck_meta_and_bad_input():
    n = 600
    s1, s2, a1, a2 = _state(n)
    lists = ([torch.randn(n)], [torch.randn(n)], [s1], [s2], [torch.zeros(())], [a1], [a2], [])
    flat = dict(
        lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True, maximize=False, state_bits=8
    )  # fmt: skip
    torch.library.opcheck(torch.ops.pyfastpeft.adamw_, lists, flat)
    torch.ops.pyfastpeft.adamw_(*[[t.to("meta") for t in each] for each in lists], **flat)
    for i, bad in ((5, []), (5, [torch.zeros(2)]), (6, [torch.zeros(3).double()])):
        wrong = [*lists[:i], bad, *lists[i + 1 :]]
        with pytest.raises(ValueError, match=r"absmax\d\[0\] .*expected 3 contiguous float32 \(= ceil\(600 / 256\)\)"):
            torch.ops.pyfastpeft.adamw_(*wrong, **flat)
    with pytest.raises(TypeError, match="uint8 for both moments"):
        torch.ops.pyfastpeft.adamw_(*lists[:3], [torch.zeros(n)], *lists[4:], **flat)
