"""linear_lora, forward and backward, beside PEFT's layer and the frozen base alone; and linear_4bit with its LoRA.

"base" is what training the layer would cost with no adapter: F.linear, backward to x. The cost of LoRA is ours / base.
PEFT holds fp32 adapters (its default, autocast_adapter_dtype) and casts x to fp32 for them.
"""

import torch
from _harness import Bench

import pyfastpeft as pf

SHAPES = [(512, 1024, 1024, 16), (2048, 1024, 1024, 16), (512, 4096, 4096, 16), (512, 4096, 4096, 64)]


def _peft_layer(weight, a, b, p):
    import peft

    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = peft.LoraConfig(r=a.shape[0], lora_alpha=a.shape[0], lora_dropout=p, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    return model


def main() -> None:
    bench = Bench("linear_lora", __doc__)
    for dtype in (torch.bfloat16, torch.float32):
        for M, N, K, R in SHAPES:
            x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
            weight = (torch.randn(N, K) * 0.02).to(dtype)
            a, b = (torch.randn(R, K) / K**0.5).requires_grad_(), (torch.randn(N, R) / 8).requires_grad_()
            q = pf.ops.quantize_4bit(weight, 64, double_quant=True)
            leaf = x.requires_grad_()
            for p in (0.0, 0.1):
                model = _peft_layer(weight, a.detach(), b.detach(), p)
                adapter = [t for t in model.parameters() if t.requires_grad]
                assert [t.dtype for t in adapter] == [torch.float32] * 2

                def check(x=x, weight=weight, a=a, b=b, model=model, p=p):
                    if p == 0:
                        exact = x.double() @ weight.double().t() + x.double() @ a.double().t() @ b.double().t()
                        ours, peer = (
                            (y.double() - exact).norm() for y in (pf.ops.linear_lora(x, weight, None, a, b), model(x))
                        )
                        assert ours <= peer * 1.01, f"error {ours}, PEFT's {peer}"

                def step(f, leaves, leaf=leaf, grad=grad):
                    return torch.autograd.grad(f(leaf), (leaf, *leaves), grad)

                def ours(leaf=leaf, w=weight, a=a, b=b, p=p, step=step):
                    return step(lambda v: pf.ops.linear_lora(v, w, None, a, b, 1.0, p), (a, b))

                candidates = {
                    "ours": ours,
                    "peft": lambda model=model, adapter=adapter, step=step: step(model, adapter),
                    "base": lambda w=weight, step=step: step(lambda v: torch.nn.functional.linear(v, w), ()),
                    "ours 4-bit": lambda q=q, a=a, b=b, p=p, step=step: step(
                        lambda v: pf.ops.linear_4bit(v, q, None, a, b, 1.0, p), (a, b)
                    ),
                }
                name = f"M {M} N {N} K {K} R {R} {str(dtype).removeprefix('torch.')} dropout {p}"
                row = bench.compare(f"{name} forward + backward", candidates, check=check)
                seconds = row["seconds"]
                row["cost_over_base"] = {key: seconds[key] / seconds["base"] - 1 for key in ("ours", "peft")}
                print(
                    f"    over base: ours {row['cost_over_base']['ours']:+.0%}, peft {row['cost_over_base']['peft']:+.0%}"
                )
    bench.finish()


if __name__ == "__main__":
    main()
