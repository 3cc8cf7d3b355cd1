"""A mixed batch through a LoRA layer: ours, PEFT's loop over the adapters, ours with one adapter for all, the base alone.

Each sample of the batch has one of `adapters` adapters (`model(x, adapter_names=[...])`). "one adapter" is the same batch
without names: what the layer costs when nobody mixes. Decode: a row a sample; prefill: many. "training": forward and backward,
to the input and to every adapter in the batch (in eval mode, since PEFT takes adapter_names in no other).
"""

import torch

import pyfastpeft as pf

# samples, rows of a sample, N, K, R, adapters
DECODE = [(64, 1, 2048, 2048, 16, adapters) for adapters in (1, 4, 16, 64)] + [(8, 1, 4096, 4096, 16, 8)]
TRAINING = [(64, 1, 2048, 2048, 16, 64), (8, 128, 2048, 2048, 16, 8)]
PREFILL = [(8, 128, 2048, 2048, 16, adapters) for adapters in (1, 8)]


def run(suite) -> None:
    peft = suite.peer("peft")
    for dtype in suite.pick((torch.bfloat16, torch.float32), (torch.bfloat16,)):
        for shape in suite.pick(DECODE + PREFILL, [DECODE[0], DECODE[3], PREFILL[1]]):
            with torch.no_grad():
                _row(suite, peft, dtype, *shape)
        for shape in suite.pick(TRAINING, TRAINING[1:]):
            _training_row(suite, peft, dtype, *shape)


def _row(suite, peft, dtype, samples, rows, N, K, R, adapters) -> None:
    x = torch.randn(samples, rows, K).to(dtype)
    weight = (torch.randn(N, K) * 0.02).to(dtype)
    names = [f"a{i}" for i in range(adapters)]
    batch = [names[i % adapters] for i in range(samples)]
    ours = _model(pf, weight, names, R)
    theirs = None if peft is None else _model(peft, weight, names, R)

    def check():
        exact = torch.nn.functional.linear(x.double(), weight.double())
        layer = ours.base_model.model[0]
        for i, name in enumerate(batch):
            a, b = (layer.__getattr__(part)[name].weight.double() for part in ("lora_A", "lora_B"))
            exact[i] += x[i].double() @ a.t() @ b.t()
        error = (ours(x, adapter_names=batch).double() - exact).norm()
        if theirs is not None:
            peer = (theirs(x, adapter_names=batch).double() - exact).norm()
            assert error <= peer * 1.01, f"error {error}, PEFT's {peer}"

    suite.compare(
        f"{samples} samples of {rows} rows, {adapters} adapters, N {N} K {K} R {R} {str(dtype).removeprefix('torch.')}",
        {
            "ours": lambda: ours(x, adapter_names=batch),
            "peft": None if theirs is None else lambda: theirs(x, adapter_names=batch),
            "one adapter": lambda: ours(x),
            "base": lambda: torch.nn.functional.linear(x, weight),
        },
        flops=2 * samples * rows * N * K, dtype=dtype, check=check, M=samples * rows, N=N, K=K, R=R, adapters=adapters,
    )  # fmt: skip


def _training_row(suite, peft, dtype, samples, rows, N, K, R, adapters) -> None:
    x = torch.randn(samples, rows, K).to(dtype).requires_grad_()
    cotangent = torch.randn(samples, rows, N).to(dtype)
    weight = (torch.randn(N, K) * 0.02).to(dtype)
    names = [f"a{i}" for i in range(adapters)]
    batch = [names[i % adapters] for i in range(samples)]
    with torch.no_grad():
        ours = _model(pf, weight, names, R)
        theirs = None if peft is None else _model(peft, weight, names, R)

    def step(model, adapter_names):
        leaves = [p for name, p in model.named_parameters() if "lora_" in name]
        for p in leaves:
            p.requires_grad_(True)
        if adapter_names is None:
            leaves = leaves[:2]

        def run():
            more = {} if adapter_names is None else {"adapter_names": adapter_names}
            return torch.autograd.grad(model(x, **more), [x, *leaves], cotangent, allow_unused=True)

        return run

    def check():
        if theirs is None:
            return
        for mine, other in zip(step(ours, batch)(), step(theirs, batch)(), strict=True):
            assert (mine.double() - other.double()).norm() <= 0.02 * other.double().norm()

    suite.compare(
        f"training: {samples} samples of {rows} rows, {adapters} adapters, N {N} K {K} R {R} "
        f"{str(dtype).removeprefix('torch.')}",
        {
            "ours": step(ours, batch),
            "peft": None if theirs is None else step(theirs, batch),
            "one adapter": step(ours, None),
        },
        flops=4 * samples * rows * N * K, dtype=dtype, check=check, M=samples * rows, N=N, K=K, R=R, adapters=adapters,
    )  # fmt: skip


def _model(library, weight, names, R):
    """A model of one layer, the same adapters for either library."""
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = library.LoraConfig(r=R, lora_alpha=R, target_modules=["0"])
    model = library.get_peft_model(torch.nn.Sequential(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    layer, generator = model.base_model.model[0], torch.Generator().manual_seed(0)
    for name in names:
        for part in (layer.lora_A, layer.lora_B):
            shape = part[name].weight.shape
            part[name].weight.copy_(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
    return model.eval()
