"""linear_4bit beside bitsandbytes (its inference and its training path), torchao and torch's dense layer, over tokens.

"bitsandbytes" dequantises the whole weight, then multiplies: what its Linear4bit does while training. "bitsandbytes eval"
is Linear4bit in eval mode, which on a CPU with AVX-512 BF16 repacks the weight in place (a copy of its own here) and is
fast for few tokens; rows beyond EVAL_TOKENS leave it out, as its time grows with the tokens. "dense" is F.linear on an
unquantised weight: what a 4-bit layer gives up or gains for its memory. Backward is to x alone, as in a frozen layer.
"+ LoRA" adds a low-rank path of rank 16: ours with fp32 adapters inside the op, the others' as two F.linear in x's dtype,
their fastest.
"""

import torch
from torch.nn.functional import linear

import pyfastpeft as pf

from .torchao_nf4 import torchao_nf4

SHAPES = ((4096, 4096), (14336, 4096))  # N, K; the second's packed bytes do not fit most caches
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
LORA_TOKENS = (1, 16, 512)
RANK = 16
EVAL_TOKENS = 128


def run(suite) -> None:
    bnb, torchao = suite.peer("bitsandbytes"), torchao_nf4(suite)
    for N, K in suite.pick(SHAPES, SHAPES[:1]):
        weight = torch.randn(N, K) * 0.02
        for dtype in suite.pick((torch.bfloat16, torch.float32), (torch.bfloat16,)):
            dense = weight.to(dtype)
            q = pf.ops.quantize_4bit(dense, 64, double_quant=True)
            truth = pf.ops.dequantize_4bit(q, dtype=torch.float32)
            theirs, eval_layer = (None, None) if bnb is None else (_training_path(bnb, dense), _eval_layer(bnb, dense))
            ao_weight = None if torchao is None or dtype != torch.bfloat16 else torchao.to_nf4(dense, 64)
            ao = ao_weight is not None and (lambda x, weight=ao_weight: torchao.linear_nf4(x, weight))
            for M in suite.pick(TOKENS if N == K else (1, 16, 512), (1, 16, 128, 512)):
                _rows(suite, M, dtype, dense, q, truth, theirs, eval_layer, ao or None)
            for M in suite.pick(LORA_TOKENS, ()):
                _lora_rows(suite, M, dtype, dense, q, theirs, eval_layer)


def _lora_rows(suite, M, dtype, dense, q, theirs, eval_layer) -> None:
    N, K = dense.shape
    x, a, b = torch.randn(M, K).to(dtype), torch.randn(RANK, K) / K**0.5, torch.randn(N, RANK)
    narrow_a, narrow_b = a.to(dtype), b.to(dtype)

    def adapted(layer):
        return layer and (lambda: layer(x) + linear(linear(x, narrow_a), narrow_b))

    with torch.no_grad():
        suite.compare(
            f"{'' if N == K else f'{N} x {K} '}M {M} {str(dtype).removeprefix('torch.')} forward + LoRA",
            {
                "ours": lambda: pf.ops.linear_4bit(x, q, None, a, b),
                "bitsandbytes": adapted(theirs),
                _eval_name(dtype): adapted(eval_layer) if M <= EVAL_TOKENS else None,
                "dense": adapted(lambda t: linear(t, dense)),
            },
            flops=2 * M * (N * K + RANK * (N + K)), dtype=dtype, M=M, N=N, K=K,
        )  # fmt: skip


def _rows(suite, M, dtype, dense, q, truth, theirs, eval_layer, torchao) -> None:
    N, K = dense.shape
    x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    name = f"{'' if N == K else f'{N} x {K} '}M {M} {str(dtype).removeprefix('torch.')}"

    def check():
        for inputs in (x[:64], torch.nn.functional.gelu(x[:64])):  # the second's mean is not zero: biases show
            exact = inputs.double() @ truth.double().t()
            ours, torchs = (
                float((y.double() - exact).norm() / exact.norm())
                for y in (pf.ops.linear_4bit(inputs, q), linear(inputs, truth.to(dtype)))
            )
            assert ours <= 2 * torchs + 1e-7, f"relative error {ours:.1e}, torch's {torchs:.1e}"

    flops = 2 * M * N * K
    with torch.no_grad():
        suite.compare(
            f"{name} forward",
            {
                "ours": lambda: pf.ops.linear_4bit(x, q),
                "bitsandbytes": theirs and (lambda: theirs(x)),
                _eval_name(dtype): (lambda: eval_layer(x)) if eval_layer and M <= EVAL_TOKENS else None,
                "torchao": torchao and (lambda: torchao(x)),
                "dense": lambda: linear(x, dense),
            },
            moved_bytes=q.nbytes + x.nbytes + grad.nbytes, flops=flops, dtype=dtype, check=check, M=M, N=N, K=K,
        )  # fmt: skip
    if M == 1:
        return
    leaf = x.clone().requires_grad_()

    def step(f):
        return torch.autograd.grad(f(leaf), leaf, grad)

    suite.compare(
        f"{name} forward + backward",
        {
            "ours": lambda: step(lambda t: pf.ops.linear_4bit(t, q)),
            "bitsandbytes": theirs and (lambda: step(theirs)),
            "torchao": torchao and (lambda: step(torchao)),
            "dense": lambda: step(lambda t: linear(t, dense)),
        },
        flops=2 * flops, dtype=dtype, M=M, N=N, K=K,
    )  # fmt: skip


def _eval_name(dtype) -> str:
    """It multiplies in bf16 whatever x is: for fp32 x its results are 3e-3 off, torch's 3e-7."""
    return "bitsandbytes eval" if dtype == torch.bfloat16 else "bitsandbytes eval in bf16"


def _training_path(bnb, weight):
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)


def _eval_layer(bnb, weight):
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu").eval()
