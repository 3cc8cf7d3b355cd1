"""4-bit dequantisation to bf16, plain and nested, into a given and into a new tensor, beside bitsandbytes and torchao."""

import ctypes

import torch

import pyfastpeft as pf

from .torchao_nf4 import torchao_nf4

BLOCKSIZE = 64
# the first stays in many a last-level cache, the second does not
SHAPES = [(4096, 4096), (4096, 14336)]


def run(suite) -> None:
    bnb, torchao = suite.peer("bitsandbytes"), torchao_nf4(suite)
    for N, K in suite.pick(SHAPES, SHAPES[:1]):
        weight = (torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
        out = torch.empty_like(weight)
        plain = pf.ops.quantize_4bit(weight, BLOCKSIZE)
        nested = pf.ops.quantize_4bit(weight, BLOCKSIZE, double_quant=True)

        candidates = {"ours": lambda q=plain, out=out: pf.ops.dequantize_4bit(q, out=out)}
        check = None
        if bnb is not None:
            their_out = torch.empty_like(weight)
            candidates["bitsandbytes kernel"] = _their_kernel(bnb, plain, their_out)

            def check(q=plain, out=out, kernel=candidates["bitsandbytes kernel"], their_out=their_out):
                kernel()
                assert torch.equal(pf.ops.dequantize_4bit(q, out=out), their_out), "values differ from bitsandbytes'"

        suite.compare(
            f"{N}x{K} into a given tensor", candidates, check=check, moved_bytes=plain.nbytes + out.nbytes, N=N, K=K
        )
        suite.compare(
            f"{N}x{K} nested into a given tensor",
            {
                "ours": lambda q=nested, out=out: pf.ops.dequantize_4bit(q, out=out),
                "ours plain": lambda q=plain, out=out: pf.ops.dequantize_4bit(q, out=out),
            },
            moved_bytes=nested.nbytes + out.nbytes,
            N=N,
            K=K,
        )
        for q in (plain, nested):
            theirs = None if bnb is None else _their_dequantize(bnb, q)

            def check_new(q=q, theirs=theirs):
                if theirs is not None:
                    assert torch.equal(pf.ops.dequantize_4bit(q), theirs()), "values differ from bitsandbytes'"

            candidates = {"ours": lambda q=q: pf.ops.dequantize_4bit(q), "bitsandbytes": theirs}
            if torchao is not None and q.is_nested:  # it has no other
                candidates["torchao"] = torchao.to_nf4(weight, BLOCKSIZE).get_original_weight
            suite.compare(
                f"{N}x{K} {'nested ' if q.is_nested else ''}into a new tensor",
                candidates,
                moved_bytes=q.nbytes + out.nbytes,
                check=check_new,
                N=N,
                K=K,
            )


def _their_kernel(bnb, q, out):
    """bitsandbytes' compiled kernel alone, without its Python and its allocation."""
    lib, get_ptr = bnb.cextension.lib, bnb.functional.get_ptr
    N, K = q.shape

    def call():
        lib.cdequantize_blockwise_cpu_nf4_bf16(
            get_ptr(q.packed), get_ptr(q.absmax), get_ptr(out),
            ctypes.c_longlong(BLOCKSIZE), ctypes.c_longlong(N), ctypes.c_longlong(K),
        )  # fmt: skip

    return call


def _their_dequantize(bnb, q):
    stats = {key.removeprefix("weight."): t for key, t in q.state_dict().items() if key != "weight"}
    state = bnb.functional.QuantState.from_dict(stats, device=torch.device("cpu"))
    return lambda: bnb.functional.dequantize_4bit(q.packed, state)
