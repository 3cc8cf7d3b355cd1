"""linear_4bit beside bitsandbytes (its inference and its training path) and torch's dense layer, over tokens.

"bitsandbytes" dequantises the whole weight, then multiplies: what its Linear4bit does while training. "bitsandbytes eval"
is Linear4bit in eval mode, which on a CPU with AVX-512 BF16 repacks the weight in place (a copy of its own here) and is
fast for few tokens; rows beyond EVAL_TOKENS leave it out, as its time grows with the tokens. "dense" is F.linear on an unquantised weight: what a 4-bit layer
gives up or gains for its memory. Backward is to x alone, as in a frozen base layer.
"""

import torch
from _harness import Bench

import pyfastpeft as pf

N = K = 4096
TOKENS = (1, 4, 16, 64, 128, 512, 2048)
EVAL_TOKENS = 128


def bitsandbytes_eval(weight: torch.Tensor):
    """A bitsandbytes Linear4bit in eval mode, double-quantised."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu").eval()


def main() -> None:
    bench = Bench("linear_4bit", __doc__)
    import bitsandbytes as bnb
    import bitsandbytes.functional as bnb_functional

    weight = torch.randn(N, K) * 0.02
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        dense = weight.to(dtype)
        q = pf.ops.quantize_4bit(dense, 64, double_quant=True)
        packed, state = bnb_functional.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=True)
        truth = pf.ops.dequantize_4bit(q, dtype=torch.float32)
        eval_layer = bitsandbytes_eval(dense)

        def theirs(x, packed=packed, state=state):
            return bnb.matmul_4bit(x, packed.t(), quant_state=state)

        for M in TOKENS:
            x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)

            def check(x=x, q=q, truth=truth, theirs=theirs):
                exact = x[:64].float() @ truth.t()
                ours, peer = ((f(x[:64]).float() - exact).norm() for f in (lambda x: pf.ops.linear_4bit(x, q), theirs))
                assert ours <= 2 * peer + 1e-6 * exact.norm(), f"error {ours}, bitsandbytes' {peer}"

            candidates = {
                "ours": lambda x=x, q=q: pf.ops.linear_4bit(x, q),
                "bitsandbytes": lambda x=x, f=theirs: f(x),
                "dense": lambda x=x, w=dense: torch.nn.functional.linear(x, w),
            }
            forward = dict(candidates)
            if M <= EVAL_TOKENS:
                forward["bitsandbytes eval"] = lambda x=x, f=eval_layer: f(x)
            with torch.no_grad():
                bench.compare(f"M {M} {name} forward", forward, moved_bytes=q.nbytes, check=check)
            if M == 1:
                continue
            leaf = x.clone().requires_grad_()

            def step(f, leaf=leaf, grad=grad):
                return torch.autograd.grad(f(leaf), leaf, grad)

            bench.compare(
                f"M {M} {name} forward + backward",
                {
                    "ours": lambda q=q, step=step: step(lambda t: pf.ops.linear_4bit(t, q)),
                    "bitsandbytes": lambda f=theirs, step=step: step(f),
                    "dense": lambda w=dense, step=step: step(lambda t: torch.nn.functional.linear(t, w)),
                },
            )
    bench.finish()


if __name__ == "__main__":
    main()
