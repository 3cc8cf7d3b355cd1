"""4-bit quantisation in blocks of 64, beside bitsandbytes and (NF4, always double) torchao."""

import torch

import pyfastpeft as pf

from .torchao_nf4 import torchao_nf4

BLOCKSIZE = 64


def run(suite) -> None:
    bnb, torchao = suite.peer("bitsandbytes"), torchao_nf4(suite)
    dtypes = suite.pick((torch.bfloat16, torch.float16, torch.float32), (torch.bfloat16,))
    kinds = suite.pick((("nf4", False), ("nf4", True), ("fp4", False)), (("nf4", False), ("nf4", True)))
    N, K = suite.pick((4096, 4096), (2048, 2048))
    for dtype in dtypes:
        for quant_type, nested in kinds:
            weight = (torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)

            def ours(weight=weight, quant_type=quant_type, nested=nested):
                return pf.ops.quantize_4bit(weight, BLOCKSIZE, quant_type, nested)

            def theirs(weight=weight, quant_type=quant_type, nested=nested):
                return bnb.functional.quantize_4bit(
                    weight, blocksize=BLOCKSIZE, quant_type=quant_type, compress_statistics=nested
                )

            def check(quant_type=quant_type, ours=ours, theirs=theirs):
                if bnb is not None and quant_type == "nf4":
                    assert torch.equal(ours().packed, theirs()[0]), "the bytes differ from bitsandbytes'"

            name = f"{N}x{K} {str(dtype).removeprefix('torch.')} {quant_type}{' double' if nested else ''}"
            candidates = {"ours": ours, "bitsandbytes": theirs if bnb else None}
            if torchao is not None and dtype == torch.bfloat16 and (quant_type, nested) == ("nf4", True):
                candidates["torchao"] = lambda weight=weight: torchao.to_nf4(weight, BLOCKSIZE)
            suite.compare(
                name, candidates, check=check, N=N, K=K,
                moved_bytes=weight.nbytes + weight.numel() // 2 + 4 * weight.numel() // BLOCKSIZE,
            )  # fmt: skip
