"""NF4 quantisation and dequantisation of 4096 x 14336 in bf16, plain and nested, beside bitsandbytes."""

import torch
from _gpu import GpuBench, peer, rotations

import pyfastpeft as pf

N, K, BLOCKSIZE = 4096, 14336, 64


def peers_state(q):
    import bitsandbytes.functional as bnb

    state = {key.removeprefix("weight."): t for key, t in q.state_dict().items() if key != "weight"}
    return bnb.QuantState.from_dict(state, device=torch.device("cuda"))


def main() -> None:
    bench = GpuBench("nf4", __doc__)
    copies = rotations(N * K * 2, at_least=3)
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]

    candidates = {"ours": [lambda w=w: pf.ops.quantize_4bit(w, BLOCKSIZE, check_finite=False) for w in weights]}
    with peer("bitsandbytes"):
        import bitsandbytes.functional as bnb

        candidates["bitsandbytes"] = [
            lambda w=w: bnb.quantize_4bit(w, blocksize=BLOCKSIZE, quant_type="nf4") for w in weights
        ]
    moved = weights[0].nbytes + N * K // 2 + N * K // BLOCKSIZE * 4
    bench.compare(f"quantise {N}x{K}", candidates, moved_bytes=moved)

    outs = [torch.empty_like(w) for w in weights]
    for nested in (False, True):
        qs = [pf.ops.quantize_4bit(w, BLOCKSIZE, double_quant=nested) for w in weights]
        candidates = {
            "ours": [lambda q=q, o=o: pf.ops.dequantize_4bit(q, out=o) for q, o in zip(qs, outs, strict=True)]
        }
        check = None
        with peer("bitsandbytes"):
            import bitsandbytes.functional as bnb

            states = [peers_state(q) for q in qs]
            candidates["bitsandbytes"] = [
                lambda q=q, s=s, o=o: bnb.dequantize_4bit(q.packed, s, out=o)
                for q, s, o in zip(qs, states, outs, strict=True)
            ]

            def check(q=qs[0], state=states[0]):
                ours, theirs = pf.ops.dequantize_4bit(q), bnb.dequantize_4bit(q.packed, state)
                assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16)), "values differ from bitsandbytes'"

        moved = qs[0].nbytes + outs[0].nbytes
        bench.compare(f"dequantise {N}x{K}{' nested' if nested else ''}", candidates, moved_bytes=moved, check=check)
    bench.finish()


if __name__ == "__main__":
    main()
