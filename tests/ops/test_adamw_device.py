"""adamw_ where it runs: CPU, GPU, and the GPU's kernel on the host executor; the reference's bits everywhere."""

import pytest
import torch

import pyfastpeft as pf
from pyfastpeft.ops import _cuda
from pyfastpeft.ops import adamw as module
from pyfastpeft.reference import adamw as reference
from pyfastpeft.reference.nf4 import dynamic_map

TAILS = [0, 1, 3, 127, 128, 129, 255, 256, 257, 1000]
LARGE = 70 * 256 + 3  # more blocks of 256 than the executor's GPU has warps
LOW = [torch.bfloat16, torch.float16]


def _randn(sizes, dtype, seed, device):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(device, dtype) for n in sizes]


class Lists:
    """The op's lists on a device, and what the reference makes of the same tensors on the CPU."""

    def __init__(self, device, sizes, dtype=torch.float32, *, masters=False, bits8=False, seed=0):
        self.device, self.sizes, self.dtype, self.bits8 = device, sizes, dtype, bits8
        self.params = _randn(sizes, dtype, seed, device)
        kind = torch.uint8 if bits8 else torch.float32
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros(n, dtype=kind, device=device) for n in sizes] for _ in "mv")
        self.absmax1, self.absmax2 = (
            [torch.zeros(-(n // -256), device=device) for n in sizes] if bits8 else [] for _ in "mv"
        )
        self.steps = [torch.zeros((), device=device) for _ in sizes]
        self.masters = [p.float() for p in self.params] if masters else []
        self.expected = [
            [p.float().cpu().clone(), m.cpu().clone(), v.cpu().clone()]
            for p, m, v in zip(self.params, self.exp_avgs, self.exp_avg_sqs, strict=True)
        ]
        if bits8:
            for row, a, b in zip(self.expected, self.absmax1, self.absmax2, strict=True):
                row += [a.cpu().clone(), b.cpu().clone()]

    def step(self, grads, **options):
        options = {"lr": 1e-2, "state_bits": 8 if self.bits8 else 32, **options}
        pf.ops.adamw_(
            self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.absmax1, self.absmax2, self.masters,
            **options,
        )  # fmt: skip

    def step_reference(self, grads, step, seed=None, qmaps=(), **options):
        for i, (row, grad) in enumerate(zip(self.expected, grads, strict=True)):
            options = {"lr": 1e-2, **options}
            if self.bits8:
                row[:] = reference.adamw_step_8bit(row[0], grad.cpu(), *row[1:], step, *qmaps, **options)
            else:
                row[:] = reference.adamw_step(row[0], grad.cpu(), *row[1:], step, **options)
            if not self.masters:
                exact = row[0]
                rounded = reference.round_stochastically(exact, self.dtype, seed, i) if seed else exact.to(self.dtype)
                row[0] = rounded.float()

    def check(self, step=None):
        got = [self.exp_avgs, self.exp_avg_sqs, *([self.absmax1, self.absmax2] if self.bits8 else [])]
        for i, row in enumerate(self.expected):
            for name, a, b in zip(
                ("exp_avg", "exp_avg_sq", "absmax1", "absmax2"), [g[i] for g in got], row[1:], strict=False
            ):
                assert torch.equal(a.cpu().nan_to_num(nan=-7), b.nan_to_num(nan=-7)), (name, i, self.sizes[i])
            assert torch.equal(self.params[i].cpu().nan_to_num(nan=-7), row[0].to(self.dtype).nan_to_num(nan=-7)), i
            if self.masters:
                assert torch.equal(self.masters[i].cpu(), row[0]), i
        assert step is None or all(s == step for s in self.steps)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoupled": False, "maximize": True},
        {"beta1": 0.3, "beta2": 0.9, "eps": 1e-4},
        {"weight_decay": 0.0, "beta1": 0.0},
    ],
    ids=str,
)
def test_equals_the_reference(device, options):
    lists = Lists(device, [*TAILS, LARGE])
    for t in (1, 2, 3):
        grads = _randn(lists.sizes, torch.float32, t, device)
        lists.step(grads, **options)
        lists.step_reference(grads, t, **options)
    lists.check(step=3)


@pytest.mark.parametrize("grad_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("way", ["nearest", "stochastic", "master"])
def test_low_precision_parameters(device, dtype, grad_dtype, way):
    lists = Lists(device, [*TAILS, 777], dtype, masters=way == "master")
    lists.params[3].mul_(1e-6)  # fp16: subnormals
    lists.params[4][5] = torch.finfo(dtype).max
    lists.expected[3][0], lists.expected[4][0] = lists.params[3].float().cpu(), lists.params[4].float().cpu()
    if lists.masters:
        lists.masters[3].copy_(lists.params[3])
        lists.masters[4].copy_(lists.params[4])
    for t in (1, 2):
        grads = _randn(lists.sizes, torch.float32 if grad_dtype == "float32" else dtype, t, device)
        seed = 0x1234567890ABCDE + t if way == "stochastic" else None
        lists.step(grads, rounding_seed=torch.tensor([seed], device=device) if seed else None)
        lists.step_reference(grads, t, seed=seed)
    lists.check(step=2)


@pytest.mark.parametrize(
    ("dtype", "way"),
    [(torch.float32, "nearest"), *((d, way) for d in LOW for way in ("nearest", "stochastic", "master"))],
)
def test_8bit_state(device, dtype, way):
    lists = Lists(device, TAILS, dtype, bits8=True, masters=way == "master")
    for t in (1, 2, 3):
        spread = [10.0 ** torch.randint(-6, 2, (n,), device=device) for n in lists.sizes]
        grads = [(g * s).to(dtype) for g, s in zip(_randn(lists.sizes, dtype, t, device), spread, strict=True)]
        seed = 77 + t if way == "stochastic" else None
        lists.step(grads, rounding_seed=torch.tensor([seed], device=device) if seed else None)
        lists.step_reference(grads, t, seed=seed)
    lists.check(step=3)


def _encoded(device, values, moment):
    """Codes and absmax that the kernel makes of `values` (moment 1: of their squares)."""
    lists = Lists(device, [values.numel()], bits8=True)
    none = {"beta1": 0.0} if moment == 0 else {"beta2": 0.0}
    lists.step([values.to(device)], weight_decay=0.0, **none)
    codes, absmax = (lists.exp_avgs, lists.absmax1) if moment == 0 else (lists.exp_avg_sqs, lists.absmax2)
    return codes[0].cpu(), absmax[0].cpu()


@pytest.mark.parametrize("moment", [0, 1])
def test_nearest_code_on_and_around_every_level_and_midpoint(device, moment):
    qmap = dynamic_map(moment == 0)
    middle = ((qmap[:-1].double() + qmap[1:].double()) / 2).float()
    probes = torch.cat([qmap, middle])
    inf = torch.tensor(float("inf"))
    probes = torch.cat([probes, torch.nextafter(probes, inf), torch.nextafter(probes, -inf)]).clamp(-1, 1)
    if moment == 1:
        probes = probes.clamp(min=0).sqrt()
        probes = torch.cat([probes, torch.nextafter(probes, inf), torch.nextafter(probes, -inf)]).clamp(0, 1)
    probes = torch.nn.functional.pad(probes, (0, -probes.numel() % 255)).reshape(-1, 255)
    probes = torch.cat([torch.ones(len(probes), 1), probes], 1).reshape(-1)  # absmax 1 in each block
    codes, _ = _encoded(device, probes, moment)
    values = probes if moment == 0 else probes * probes
    distance = (qmap.double() - values.double().unsqueeze(1)).abs()
    assert torch.equal(codes.long(), distance.argmin(1))  # argmin: the first of equals


@pytest.mark.parametrize("largest", [1e-45, 1e-42, 1.17e-38, 1.18e-38, 1e-20, 1e30, 3e38])
def test_moments_of_any_magnitude(device, largest):
    values = torch.linspace(-1, 1, 515) * largest
    codes, absmax = _encoded(device, values, 0)
    expected_codes, expected_absmax = reference.quantize_moment(values, dynamic_map(True))
    assert torch.equal(codes, expected_codes) and torch.equal(absmax, expected_absmax)


def test_a_map_of_ones_own(device):
    """Not piecewise linear as the dynamic maps are: the codes are searched for."""
    qmap1, qmap2 = torch.linspace(-1, 1, 256) ** 3, torch.linspace(0, 1, 256) ** 5
    lists = Lists(device, [700], bits8=True)
    for t in (1, 2):
        grads = _randn([700], torch.float32, t, device)
        lists.step(grads, qmap1=qmap1.to(device), qmap2=qmap2.to(device))
        lists.step_reference(grads, t, qmaps=(qmap1, qmap2))
    lists.check(step=2)


@pytest.mark.parametrize("bits8", [False, True])
def test_nan_and_infinity(device, bits8):
    lists = Lists(device, [600], bits8=bits8)
    for t in (1, 2):
        grads = _randn([600], torch.float32, t, device)
        if t == 1:
            grads[0][[1, 300]] = torch.tensor([float("nan"), -float("inf")], device=device)
        lists.step(grads)
        lists.step_reference(grads, t)
    lists.check(step=2)
    assert lists.absmax1 == [] or lists.absmax1[0].isnan().tolist() == [True, True, False]


def test_mixed_kinds_and_steps_in_one_call(device):
    """fp32, bf16 and fp16 parameters, 8-bit and fp32 state, tensors that have made different numbers of steps."""
    kinds = [
        (torch.float32, False), (torch.bfloat16, False), (torch.float16, True), (torch.float32, True),
        (torch.bfloat16, True),
    ]  # fmt: skip
    together = [Lists(device, [n], dtype, bits8=bits8, seed=n) for n, (dtype, bits8) in enumerate(kinds * 3, 400)]
    for i, each in enumerate(together):
        each.steps[0].fill_(i % 4)
    none = torch.empty(0, device=device)
    grads = [_randn(each.sizes, torch.float32, i, device)[0] for i, each in enumerate(together)]
    pf.ops.adamw_(
        [e.params[0] for e in together], grads, [e.exp_avgs[0] for e in together], [e.exp_avg_sqs[0] for e in together],
        [e.steps[0] for e in together], [e.absmax1[0] if e.bits8 else none for e in together],
        [e.absmax2[0] if e.bits8 else none for e in together], lr=1e-2, state_bits=8,
    )  # fmt: skip
    for i, (each, grad) in enumerate(zip(together, grads, strict=True)):
        each.step_reference([grad], i % 4 + 1)
        each.check(step=i % 4 + 1)


@pytest.mark.parametrize("bits8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_off_any_alignment(device, dtype, bits8):
    """Each array one value further than the allocator puts it; neighbours stay what they are."""
    lists = Lists(device, [300, 513], dtype, bits8=bits8)
    everything = []
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        whole = [torch.full((t.numel() + 2,), 7, device=device).to(t.dtype) for t in getattr(lists, name)]
        for wide, tensor in zip(whole, getattr(lists, name), strict=True):
            wide[1:-1] = tensor
        setattr(lists, name, [wide[1:-1] for wide in whole])
        everything += whole
    grads = [g[1:] for g in _randn([301, 514], dtype, 9, device)]
    lists.step(grads)
    lists.step_reference(grads, 1)
    lists.check(step=1)
    assert all(wide[0] == 7 and wide[-1] == 7 for wide in everything)


def test_thousands_of_small_tensors(device):
    count = 300 if device.emulated else 5000
    sizes = [(7 * i) % 23 for i in range(count)]
    lists = Lists(device, sizes)
    for i, step in enumerate(lists.steps):
        step.fill_(i // 100)
    grads = _randn(sizes, torch.float32, 1, device)
    lists.step(grads)
    assert [s.item() for s in lists.steps] == [i // 100 + 1 for i in range(count)]
    for first in range(0, count, 100):
        part = Lists(device, sizes[first : first + 100])
        part.expected = lists.expected[first : first + 100]
        part.step_reference(grads[first : first + 100], first // 100 + 1)
    lists.check()


def test_a_search_that_ends_beside_the_end_of_the_list(device, monkeypatch):
    """291 tensors: a warp's search of the list goes in steps of ten, and the last of them has one tensor left of ten."""
    if device.emulated:  # a warp for each tensor, as a GPU has
        monkeypatch.setattr(_cuda, "multiprocessors", lambda *args: 40)
    lists = Lists(device, [3] * 291)
    grads = _randn(lists.sizes, torch.float32, 1, device)
    lists.step(grads)
    lists.step_reference(grads, 1)
    lists.check(step=1)


def test_scalars_on_the_device(device):
    """GradScaler's two tensors and the learning rate are read when the kernel runs."""
    lists = Lists(device, [300, 0, 20])
    grads = _randn(lists.sizes, torch.float32, 1, device)
    scaled = [g * 1024 for g in grads]
    found_inf, scale = torch.ones(1, device=device), torch.tensor(1024.0, device=device)
    lists.step(scaled, grad_scale=scale, found_inf=found_inf)
    lists.check(step=0)
    found_inf.zero_()
    for t, (lr, dtype, where) in enumerate(
        ((1e-2, torch.float32, device), (3e-3, torch.float64, device), (1e-3, torch.float64, "cpu")), 1
    ):
        rate = torch.tensor(lr, dtype=dtype, device=where)
        lists.step(scaled, grad_scale=scale, found_inf=found_inf, lr=rate)
        lists.step_reference(grads, t, lr=rate.item())
    lists.check(step=3)


def test_lists_that_come_again(device):
    """What the glue keeps for a list of tensors follows every change of it."""
    lists, others = Lists(device, [600, 50, 300]), Lists(device, [600, 50, 300], seed=5)
    for t in (1, 2, 3, 4):
        grads = _randn(lists.sizes, torch.float32, t, device)
        if t == 3:  # new state and another size, behind the same first parameter and count
            lists.exp_avgs = [m.clone() for m in lists.exp_avgs]
            lists.params[2] = lists.params[2][:200].clone()
            for each in (lists.exp_avgs, lists.exp_avg_sqs):
                each[2] = each[2][:200].clone()
            lists.expected[2] = [x[:200] for x in lists.expected[2]]
            lists.sizes = [600, 50, 200]
        grads = [g[:n] for g, n in zip(grads, lists.sizes, strict=True)]
        for each in (lists, others):
            mine = _randn(each.sizes, torch.float32, 10 * t, device)
            each.step(mine)
            each.step_reference(mine, t)
    lists.check(step=4)
    others.check(step=4)


def test_the_very_same_tensors_again(device):
    """Gradients filled anew in their old memory: nothing of the list is sent, and the steps go on rising."""
    lists = Lists(device, [600, 5, 300])
    grads = _randn(lists.sizes, torch.float32, 0, device)
    for t in (1, 2, 3):
        for g, fresh in zip(grads, _randn(lists.sizes, torch.float32, t, device), strict=True):
            g.copy_(fresh)
        lists.step(grads)
        lists.step_reference(grads, t)
    lists.check(step=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_call_follows_its_tensors():
    device = "cuda"
    lists = Lists(device, [5000, 300, 0], bits8=False)
    grads = _randn(lists.sizes, torch.float32, 0, device)
    rate, scale, found = torch.tensor(0.0, device=device), torch.ones(1, device=device), torch.ones(1, device=device)
    options = {"lr": rate, "grad_scale": scale, "found_inf": found}
    lists.step(grads, **options)  # skipped: found_inf
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists.step(grads, **options)
    for t in (1, 2, 3):
        other = Lists(device, [5000, 300, 0], seed=9)  # the kept tables move on, the graph does not follow them
        other.step(_randn(other.sizes, torch.float32, 1, device))
        fresh = _randn(lists.sizes, torch.float32, t, device)
        for g, f in zip(grads, fresh, strict=True):
            g.copy_(f)
        found.zero_()
        rate.fill_(0.5**t)
        graph.replay()
        lists.step_reference(fresh, t, lr=0.5**t)
        found.fill_(1.0)
        graph.replay()
    lists.check(step=3)


def test_tensors_elsewhere_are_refused(device):
    lists = Lists(device, [8, 4])
    grads = _randn(lists.sizes, torch.float32, 1, device)
    other = "cpu" if device == "cuda" else "meta"
    away = [grads[0], grads[1].to(other)]
    arguments = (lists.params, away, lists.exp_avgs, lists.exp_avg_sqs, lists.steps, [], [], [])
    scalars = dict.fromkeys(("qmap1", "qmap2", "lr_tensor", "grad_scale", "found_inf", "rounding_seed"))
    expected = rf"grads\[1\] is on {other}, expected params\[0\]'s {device}"
    with pytest.raises(ValueError, match=expected):
        module._prepare(*arguments, 32, **scalars)
    scalars["found_inf"] = torch.zeros(1, device=other)
    with pytest.raises(ValueError, match=rf"found_inf is on {other}, expected the parameters' {device}"):
        module._prepare(*arguments[:1], grads, *arguments[2:], 32, **scalars)
    if device == "cuda":
        with pytest.raises(ValueError, match=expected):
            pf.ops.adamw_(*arguments, lr=1e-3)
