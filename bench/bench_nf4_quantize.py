"""4-bit quantisation of a 4096x4096 weight in blocks of 64, against bitsandbytes."""

import torch
from _harness import Bench

import pyfastpeft as pf

N, K, BLOCKSIZE = 4096, 4096, 64


def main() -> None:
    bench = Bench("nf4_quantize", __doc__)
    import bitsandbytes.functional as peer

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for quant_type, nested in (("nf4", False), ("nf4", True), ("fp4", False)):
            weight = (torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)

            def ours(weight=weight, quant_type=quant_type, nested=nested):
                return pf.ops.quantize_4bit(weight, BLOCKSIZE, quant_type, nested)

            def theirs(weight=weight, quant_type=quant_type, nested=nested):
                return peer.quantize_4bit(
                    weight, blocksize=BLOCKSIZE, quant_type=quant_type, compress_statistics=nested
                )

            def check(quant_type=quant_type, ours=ours, theirs=theirs):
                if quant_type == "nf4":
                    assert torch.equal(ours().packed, theirs()[0]), "the bytes differ from bitsandbytes'"

            moved = weight.nbytes + weight.numel() // 2 + 4 * weight.numel() // BLOCKSIZE
            name = f"{N}x{K} {str(dtype).removeprefix('torch.')} {quant_type}{' double' if nested else ''}"
            bench.compare(name, {"ours": ours, "bitsandbytes": theirs}, moved_bytes=moved, check=check)
    bench.finish()


if __name__ == "__main__":
    main()
