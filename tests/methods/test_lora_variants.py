"""DoRA, initial values taken from the base (PiSSA, OLoRA, LoftQ), orthogonal ones, and LoRA+."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from pyfastpeft.methods.lora import LoraLinear
from pyfastpeft.methods.lora.initial import take_from_base
from tests.methods.contract import scatter
from tests.methods.models import TASK, batch, build
from tests.methods.test_targets import assert_unchanged, snapshot

transformers = pytest.importorskip("transformers")
BASES = ["linear", "conv1d", "nf4"]


def dora_layer(kind="linear", k=24, n=20, rank=3, dtype=torch.float32, bias=True, **config):
    torch.manual_seed(0)
    base = nn.Linear(k, n, dtype=dtype, bias=bias)
    if kind == "conv1d":
        base = transformers.pytorch_utils.Conv1D(n, k).to(dtype)
        nn.init.normal_(base.bias)
    elif kind == "nf4":
        base = pf.nn.NF4Linear.from_linear(base)
    module = LoraLinear(base.requires_grad_(False))
    module.add_adapter("a", pf.LoraConfig(r=rank, lora_alpha=5, use_dora=True, **config), "", fp32=True, init=True)
    module.activate(["a"], trainable=True)
    return module


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dora_by_its_formula(kind, dtype):
    module = dora_layer(kind, dtype=dtype)
    x = torch.randn(2, 5, 24).to(dtype)
    start = module(x)
    base = module.base_layer(x)
    assert (start - base).norm() <= {torch.float32: 1e-5}.get(dtype, 2e-2) * base.norm()  # m is the rows' length
    scatter(module, scale=0.3)
    x.requires_grad_()
    a, b, m = module.lora_A["a"].weight, module.lora_B["a"].weight, module.lora_magnitude_vector["a"].weight
    w, bias = module.base.get_weight(), module.bias

    def formula(cast):
        xs, aa, bb, mm = (t.detach().to(cast).requires_grad_() for t in (x, a, b, m))
        whole = w.to(cast) + 5 / 3 * bb @ aa
        y = (xs @ w.to(cast).T + 5 / 3 * (xs @ aa.T) @ bb.T) * (mm / whole.detach().norm(dim=1)) + bias.to(cast)
        return [y, xs, aa, bb, mm]

    truth, peer = formula(torch.float64), formula(dtype)
    y = module(x)
    assert y.dtype == dtype
    grad = torch.randn(2, 5, 20).to(dtype)
    truth[0].backward(grad.double()), peer[0].backward(grad), y.backward(grad)
    for got, theirs, right in zip(
        (y, x.grad, a.grad, b.grad, m.grad), (peer[0], *(t.grad for t in peer[1:])), (truth[0], *(t.grad for t in truth[1:])),
        strict=True,
    ):  # fmt: skip
        error, allowed = ((t.double() - right).norm() for t in (got, theirs))
        assert error <= 2 * allowed + 2e-6 * right.norm()


@pytest.mark.parametrize("kind", BASES)
def test_doras_norms_follow_the_weight_and_need_it_once(kind, monkeypatch):
    module = scatter(dora_layer(kind), scale=0.3)
    x = torch.randn(3, 24)
    whole = module.base.get_weight(torch.float32) + module.get_delta_weight("a")
    torch.testing.assert_close(module.row_norms("a"), whole.norm(dim=1), rtol=1e-5, atol=1e-6)
    reads = []
    monkeypatch.setattr(type(module.base), "get_weight", lambda *a, **k: reads.append(1))
    for _ in range(3):
        module(x).sum().backward()
    twin = copy.deepcopy(module)
    assert not reads
    monkeypatch.undo()
    module.base.set_weight(2 * module.base.get_weight())
    whole = module.base.get_weight(torch.float32) + module.get_delta_weight("a")
    torch.testing.assert_close(module.row_norms("a"), whole.norm(dim=1), rtol=1e-5, atol=1e-6)
    whole = twin.base.get_weight(torch.float32) + twin.get_delta_weight("a")
    torch.testing.assert_close(twin.row_norms("a"), whole.norm(dim=1), rtol=1e-5, atol=1e-6)


def test_dora_without_a_bias_with_dropout_with_others_and_in_fp64():
    x = torch.randn(3, 24)
    module = scatter(dora_layer(bias=False, lora_dropout=0.5), scale=0.3)
    assert torch.equal(module.eval()(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    module = scatter(dora_layer(), scale=0.3)
    module.add_adapter("plain", pf.LoraConfig(r=2, init_lora_weights=False), "", fp32=True, init=True)
    alone = []
    for name in ("a", "plain"):
        module.activate([name], trainable=True)
        alone.append(module(x))
    module.activate(["a", "plain"], trainable=True)
    torch.testing.assert_close(module(x), alone[0] + alone[1] - module.base_layer(x), rtol=1e-4, atol=1e-5)
    expected = module(x)
    module.merge(["a", "plain"], keep_snapshot=True)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    module.unmerge()
    wide = module.double()
    torch.testing.assert_close(wide(x.double()).float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_dora_model(kind, quantize, tmp_path):
    def base():
        return pf.quantize_model(build(kind)) if quantize else build(kind)

    config = pf.LoraConfig(task_type=TASK[kind], target_modules="all-linear", use_dora=True, r=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = scatter(pf.get_peft_model(base(), config))
        model.train()(**batch(kind)).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        expected = model.eval()(**batch(kind)).logits
        model.save_pretrained(tmp_path)
        again = pf.PeftModel.from_pretrained(base(), tmp_path)
        assert torch.equal(again(**batch(kind)).logits, expected)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(clone(**batch(kind)).logits, expected)
        dense = model.merge_and_unload(dtype=torch.float32)
    torch.testing.assert_close(
        dense(**batch(kind)).logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )


def test_dora_compiles():
    torch._dynamo.reset()
    module = scatter(dora_layer(), scale=0.3)
    x = torch.randn(4, 24)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
    fresh = torch.compile(scatter(dora_layer(), scale=0.3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fresh(x), module(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


TAKING = ["pissa", "pissa_niter_4", "olora", "loftq"]


def adapted(init, kind="llama", base=None, **config):
    config = {"target_modules": "all-linear", "r": 4, "lora_alpha": 12, "init_lora_weights": init, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pf.get_peft_model(build(kind) if base is None else base, pf.LoraConfig(task_type=TASK[kind], **config))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("init", TAKING)
def test_what_is_taken_from_the_base(init, kind, tmp_path):
    plain = build(kind)
    before, weights = plain(**batch(kind)).logits, {n: p.detach().clone() for n, p in plain.named_parameters()}
    model = adapted(init, kind, plain).eval()
    close = {"rtol": 1e-3, "atol": 1e-4}
    if init != "loftq":  # which only comes near
        torch.testing.assert_close(model(**batch(kind)).logits, before, **close)
    for path, layer in model.base_model.layers():
        w, delta = layer.base.get_weight(), layer.get_delta_weight("default")
        original = weights[f"{path}.weight"]
        original = original.T if kind == "gpt2" else original
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        best = sum(torch.linalg.svdvals(original)[4:] ** 2) ** 0.5
        if init == "loftq":
            quantized = pf.ops.dequantize_4bit(pf.ops.quantize_4bit(w.contiguous()))
            torch.testing.assert_close(quantized, w, rtol=1e-5, atol=1e-7)  # the base is what 4 bits can hold
            plainly = pf.ops.dequantize_4bit(pf.ops.quantize_4bit(original.contiguous()))
            assert (w + delta - original).norm() < (plainly - original).norm()
            continue
        torch.testing.assert_close(w + delta, original, rtol=1e-4, atol=1e-5)
        if init == "olora":
            torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=1e-4, atol=1e-5)
        else:
            assert w.norm().item() == pytest.approx(best.item(), rel=1e-4 if init == "pissa" else 0.05)
            torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-4)  # √S on either side
    scatter(model)
    expected = model(**batch(kind)).logits
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = pf.PeftModel.from_pretrained(build(kind), tmp_path)
    torch.testing.assert_close(again(**batch(kind)).logits, expected, **close)
    again.load_adapter(tmp_path, "default")  # once more, and nothing is taken twice
    torch.testing.assert_close(again(**batch(kind)).logits, expected, **close)
    torch.testing.assert_close(again.merge_and_unload()(**batch(kind)).logits, expected, **close)


def test_a_4_bit_base():
    quantized = pf.quantize_model(build("llama"))
    before = quantized(**batch("llama")).logits
    with pytest.warns(UserWarning, match=r"what is left of 14 weights was quantised again, which changed it by \d+"):
        model = pf.get_peft_model(quantized, pf.LoraConfig(target_modules="all-linear", r=4, init_lora_weights="pissa"))
    after = model(**batch("llama")).logits
    assert (after - before).norm() < 0.3 * before.norm()
    base = pf.quantize_model(build("llama"))
    unchanged = snapshot(base)
    with pytest.raises(ValueError, match="'loftq' needs the original weight, this one is quantised"):
        adapted("loftq", base=base)
    assert_unchanged(base, unchanged)


def test_a_failure_half_way_puts_the_weights_back(monkeypatch):
    base = build("llama").train()
    before, calls = snapshot(base), []
    svd = torch.linalg.svd

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise torch.linalg.LinAlgError("no convergence")
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    with pytest.raises(torch.linalg.LinAlgError):
        adapted("pissa", base=base)
    assert_unchanged(base, before)
    monkeypatch.undo()
    for config, words in (
        ({"r": 33}, "rank 33 exceeds the layer's"),
        ({"target_modules": ["lm_head"]}, "is model.embed_tokens's too"),
    ):
        tied = build("llama").config
        tied.tie_word_embeddings = True
        base = type(build("llama"))(tied).train()
        before = snapshot(base)
        with pytest.raises(ValueError, match=words):
            adapted("olora" if "r" in config else "pissa", base=base, **config)
        assert_unchanged(base, before)


def test_orthogonal_changes_nothing_at_first():
    base = build("llama")
    before = base(**batch("llama")).logits
    model = adapted("orthogonal", base=base)
    torch.testing.assert_close(model(**batch("llama")).logits, before, rtol=1e-4, atol=1e-5)
    layer = model.base_model.layers()[0][1]
    assert layer.lora_A["default"].weight.any() and layer.lora_B["default"].weight.any()
    with pytest.raises(ValueError, match="needs an even rank, got 3"):
        adapted("orthogonal", r=3)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"init_lora_weights": "pisa"}, NotImplementedError, "init_lora_weights='pisa'"),
        ({"init_lora_weights": "pissa_niter_x"}, NotImplementedError, "not supported yet"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}, ValueError, r"expected loftq_bits=4"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, ValueError, "loftq_iter.*positive"),
        ({"loftq_config": {"loftq_bits": 4}}, ValueError, "goes with init_lora_weights='loftq'"),
        ({"use_dora": "yes"}, TypeError, "use_dora is 'yes'"),
    ],
)
def test_bad_fields(config, error, words):
    with pytest.raises(error, match=words):
        pf.LoraConfig(**config)


def test_relora_and_adalora_refuse_dora():
    from pyfastpeft.methods.relora import merge_and_reinit

    model = pf.get_peft_model(build("llama"), pf.LoraConfig(use_dora=True))
    with pytest.raises(ValueError, match="has a DoRA adapter"):
        merge_and_reinit(model)
    with pytest.raises(ValueError, match="expected True or False"):
        pf.AdaLoraConfig(total_step=3, init_lora_weights="pissa")


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_lora_bias(quantize, tmp_path):
    base = nn.ModuleDict({"with": nn.Linear(24, 20), "without": nn.Linear(24, 20, bias=False)})
    config = pf.LoraConfig(target_modules=["with", "without"], r=3, lora_alpha=5, lora_bias=True)
    if quantize:
        base = pf.quantize_model(base, skip=())
    originals = copy.deepcopy(base)
    model = scatter(pf.get_peft_model(base, config))
    x = torch.randn(4, 24, requires_grad=True)
    for name in ("with", "without"):
        layer = model.get_base_model()[name]
        b = layer.lora_B["default"]
        expected = layer.base_layer(x) + 5 / 3 * (x @ layer.lora_A["default"].weight.T @ b.weight.T + b.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        layer(x).sum().backward()
        torch.testing.assert_close(b.bias.grad, torch.full((20,), 4 * 5 / 3))
    before = {name: layer(x) for name, layer in model.get_base_model().items()}
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(copy.deepcopy(originals), tmp_path)
    assert all(torch.equal(again.get_base_model()[name](x), y) for name, y in before.items())
    with pytest.raises(
        ValueError, match="without: an adapter with lora_bias cannot be merged into a layer that has no bias"
    ):
        model.merge_adapter()
    layer = model.get_base_model()["with"]
    bias = layer.bias.detach().clone()
    layer.merge(["default"], keep_snapshot=True)
    assert (layer(x) - before["with"]).norm() < (0.2 if quantize else 1e-5) * before["with"].norm()
    torch.testing.assert_close(layer.bias, bias + 5 / 3 * layer.lora_B["default"].bias)
    layer.unmerge()
    assert torch.equal(layer.bias, bias)
    for wrong in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match="lora_bias goes with"):
            pf.LoraConfig(lora_bias=True, **wrong)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, pf.optim.AdamW], ids=["torch", "ours"])
def test_loraplus_groups(cls):
    config = pf.LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only", use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = pf.get_peft_model(build("gpt2"), config)
    optimizer = pf.optim.create_loraplus_optimizer(
        model, cls, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, eps=1e-7
    )
    names = {id(p): n for n, p in model.named_parameters()}
    kinds = [
        ({names[id(p)].split(".")[-3 if "lora" in names[id(p)] else -1] for p in g["params"]}, g)
        for g in optimizer.param_groups
    ]
    assert [(k, g["lr"], g["weight_decay"]) for k, g in kinds] == [
        ({"lora_A"}, 1e-3, 0.1), ({"lora_B"}, 16e-3, 0.1), ({"bias", "lora_magnitude_vector"}, 16e-3, 0.0)
    ]  # fmt: skip
    assert sum(len(g["params"]) for _, g in kinds) == sum(p.requires_grad for p in model.parameters())
    assert all(g["eps"] == 1e-7 for _, g in kinds)
    with pytest.raises(ValueError, match="loraplus_lr_ratio is 0"):
        pf.optim.create_loraplus_optimizer(model, cls, lr=1e-3, loraplus_lr_ratio=0)
    with pytest.raises(ValueError, match="no trainable parameters"):
        pf.optim.create_loraplus_optimizer(model.requires_grad_(False), cls, lr=1e-3, loraplus_lr_ratio=1)


def test_loftq_comes_nearer_with_every_alternation():
    weight = torch.randn(96, 64)
    distances = []
    for iterations in (1, 2, 5):
        a, b, quantized = take_from_base(weight, 8, 3.0, "loftq", {"loftq_bits": 4, "loftq_iter": iterations})
        distances.append((quantized + 3.0 * b @ a - weight).norm().item())
    assert distances[0] > distances[1] > distances[2]
