"""4-bit dequantisation to bf16, plain and nested, into a given and into a new tensor, against bitsandbytes."""

import ctypes

import torch
from _harness import Bench

import pyfastpeft as pf

BLOCKSIZE = 64
# the first stays in many a last-level cache, the second does not
SHAPES = [(4096, 4096), (4096, 14336)]


def main() -> None:
    bench = Bench("nf4_dequantize", __doc__)
    import bitsandbytes.functional as peer
    from bitsandbytes.cextension import lib

    for N, K in SHAPES:
        weight = (torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
        out, their_out = torch.empty_like(weight), torch.empty_like(weight)
        plain = pf.ops.quantize_4bit(weight, BLOCKSIZE)
        nested = pf.ops.quantize_4bit(weight, BLOCKSIZE, double_quant=True)
        states = {}
        for q in (plain, nested):
            state = {key.removeprefix("weight."): t for key, t in q.state_dict().items() if key != "weight"}
            states[q.is_nested] = peer.QuantState.from_dict(state, device=torch.device("cpu"))

        def their_kernel(q=plain, out=their_out, N=N, K=K):
            lib.cdequantize_blockwise_cpu_nf4_bf16(
                peer.get_ptr(q.packed), peer.get_ptr(q.absmax), peer.get_ptr(out),
                ctypes.c_longlong(BLOCKSIZE), ctypes.c_longlong(N), ctypes.c_longlong(K),
            )  # fmt: skip

        def check_kernel(q=plain, out=out, their_out=their_out, their_kernel=their_kernel):
            their_kernel()
            assert torch.equal(pf.ops.dequantize_4bit(q, out=out), their_out), "the values differ from bitsandbytes'"

        def moved(q, weight=weight):
            return q.nbytes + weight.nbytes

        bench.compare(
            f"{N}x{K} into a given tensor",
            {"ours": lambda q=plain, out=out: pf.ops.dequantize_4bit(q, out=out), "bitsandbytes kernel": their_kernel},
            moved_bytes=moved(plain),
            check=check_kernel,
        )
        bench.compare(
            f"{N}x{K} nested into a given tensor",
            {
                "ours": lambda q=nested, out=out: pf.ops.dequantize_4bit(q, out=out),
                "ours plain": lambda q=plain, out=out: pf.ops.dequantize_4bit(q, out=out),
            },
            moved_bytes=moved(nested),
        )
        for q in (plain, nested):

            def ours(q=q):
                return pf.ops.dequantize_4bit(q)

            def theirs(q=q, state=states[q.is_nested]):
                return peer.dequantize_4bit(q.packed, state)

            def check(ours=ours, theirs=theirs):
                assert torch.equal(ours(), theirs()), "the values differ from bitsandbytes'"

            bench.compare(
                f"{N}x{K} {'nested ' if q.is_nested else ''}into a new tensor",
                {"ours": ours, "bitsandbytes": theirs},
                moved_bytes=moved(q),
                check=check,
            )
    bench.finish()


if __name__ == "__main__":
    main()
