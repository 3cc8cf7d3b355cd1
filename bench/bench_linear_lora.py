"""linear_lora, forward and backward, beside PEFT's layer and the frozen base alone; and linear_4bit with its LoRA.

"base" is what training the layer would cost with no adapter: F.linear, backward to x. The cost of LoRA is ours / base.
PEFT holds fp32 adapters (its default, autocast_adapter_dtype) and casts x to fp32 for them.
"""

import torch

import pyfastpeft as pf

SHAPES = [(512, 1024, 1024, 16), (2048, 1024, 1024, 16), (512, 4096, 4096, 16), (512, 4096, 4096, 64)]  # M, N, K, R


def run(suite) -> None:
    peft = suite.peer("peft")
    for dtype in suite.pick((torch.bfloat16, torch.float32), (torch.bfloat16,)):
        for shape in suite.pick(SHAPES, SHAPES[:2]):
            for dropout_p in (0.0, 0.1):
                _row(suite, peft, dtype, *shape, dropout_p)


def _row(suite, peft, dtype, M, N, K, R, dropout_p) -> None:
    leaf, grad = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(M, N).to(dtype)
    weight = (torch.randn(N, K) * 0.02).to(dtype)
    a, b = (torch.randn(R, K) / K**0.5).requires_grad_(), (torch.randn(N, R) / 8).requires_grad_()
    q = pf.ops.quantize_4bit(weight, 64, double_quant=True)
    model = None if peft is None else peft_layer(peft, weight, a.detach(), b.detach(), dropout_p)
    adapter = [] if model is None else [t for t in model.parameters() if t.requires_grad]

    def check():
        if model is None or dropout_p > 0:
            return
        assert [t.dtype for t in adapter] == [torch.float32] * 2, "PEFT's adapter is not in fp32"
        exact = leaf.double() @ weight.double().t() + leaf.double() @ a.double().t() @ b.double().t()
        ours, peer = ((y.double() - exact).norm() for y in (pf.ops.linear_lora(leaf, weight, None, a, b), model(leaf)))
        assert ours <= peer * 1.01, f"error {ours}, PEFT's {peer}"

    def step(f, leaves=()):
        return torch.autograd.grad(f(leaf), (leaf, *leaves), grad)

    result = suite.compare(
        f"M {M} N {N} K {K} R {R} {str(dtype).removeprefix('torch.')} dropout {dropout_p} forward + backward",
        {
            "ours": lambda: step(lambda v: pf.ops.linear_lora(v, weight, None, a, b, 1.0, dropout_p), (a, b)),
            "peft": None if model is None else lambda: step(model, adapter),
            "base": lambda: step(lambda v: torch.nn.functional.linear(v, weight)),
            "ours 4-bit": lambda: step(lambda v: pf.ops.linear_4bit(v, q, None, a, b, 1.0, dropout_p), (a, b)),
        },
        flops=4 * M * N * K, dtype=dtype, check=check, M=M, N=N, K=K, R=R,
    )  # fmt: skip
    if result is not None:
        seconds = result["seconds"]
        cost = {name: seconds[name] / seconds["base"] - 1 for name in ("ours", "peft") if name in seconds}
        result["cost_over_base"] = cost
        print("    over base: " + ", ".join(f"{name} {value:+.0%}" for name, value in cost.items()))


def peft_layer(peft, weight, a, b, dropout_p):
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = peft.LoraConfig(r=a.shape[0], lora_alpha=a.shape[0], lora_dropout=dropout_p, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    return model
