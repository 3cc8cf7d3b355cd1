"""(IA)³: the layer's formula, what feedforward_modules names, and T-Few's losses."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from pyfastpeft.methods.ia3 import IA3Linear, choice_scores, length_normalized_loss, tfew_loss, unlikelihood_loss
from tests.methods.models import batch, build
from tests.methods.test_targets import assert_unchanged, snapshot

transformers = pytest.importorskip("transformers")
BASES = ["linear", "conv1d", "nf4"]


def layer(kind="linear", feedforward=False, k=24, n=20, dtype=torch.float32, **more):
    torch.manual_seed(0)
    base = nn.Linear(k, n, dtype=dtype)
    if kind == "conv1d":
        base = transformers.pytorch_utils.Conv1D(n, k).to(dtype)
        nn.init.normal_(base.bias)
    elif kind == "nf4":
        base = pf.nn.NF4Linear.from_linear(base, **more)
    module = IA3Linear(base.requires_grad_(False))
    config = pf.IA3Config(
        target_modules=["x"], feedforward_modules=["x"] if feedforward else [], init_ia3_weights=False
    )
    module.add_adapter("a", config, "x", fp32=True, init=True)
    module.activate(["a"], trainable=True)
    return module


@pytest.mark.parametrize("feedforward", [True, False], ids=["input", "output"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_formula_and_its_gradients(kind, dtype, feedforward):
    module = layer(kind, feedforward, dtype=dtype)
    vector = module.ia3_l["a"]
    assert vector.shape == ((1, 24) if feedforward else (20, 1)) and vector.dtype == torch.float32
    x = torch.randn(2, 5, 24).to(dtype).requires_grad_()
    w, bias = module.base.get_weight(), module.bias

    def formula(cast):
        inputs = [x.detach().to(cast).requires_grad_(), vector.detach().to(cast).requires_grad_()]
        flat = inputs[1].reshape(-1)
        if feedforward:
            y = (inputs[0] * flat) @ w.to(cast).T + bias.to(cast)
        else:
            y = (inputs[0] @ w.to(cast).T + bias.to(cast)) * flat
        return [y, *inputs]

    truth, peer = formula(torch.float64), formula(dtype)
    y = module(x)
    assert y.dtype == dtype and y.shape == (2, 5, 20)
    grad = torch.randn(2, 5, 20).to(dtype)
    truth[0].backward(grad.double()), peer[0].backward(grad), y.backward(grad)
    for got, theirs, right in [
        (y, peer[0], truth[0]), (x.grad, peer[1].grad, truth[1].grad), (vector.grad, peer[2].grad, truth[2].grad)
    ]:  # fmt: skip
        error, allowed = ((t.double() - right).norm() for t in (got, theirs))
        assert error <= 2 * allowed + 1e-6 * right.norm()


@pytest.mark.parametrize("kind", BASES)
def test_several_adapters_multiply_and_merge_on_either_side(kind):
    module = layer(kind)
    config = pf.IA3Config(target_modules=["x"], feedforward_modules=["x"], init_ia3_weights=False)
    module.add_adapter("b", config, "x", fp32=True, init=True)  # of the input, beside one of the output
    module.activate(["a", "b"], trainable=True)
    x = torch.randn(3, 24)
    flat = {name: vector.detach().reshape(-1) for name, vector in module.ia3_l.items()}
    expected = module.base_layer(x * flat["b"]) * flat["a"]
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    weight, bias = module.base.snapshot_weight(), module.bias.clone()
    error = module.merge(["b", "a"], keep_snapshot=True)
    assert (0.02 < error < 0.15) if kind == "nf4" else error == 0.0
    assert (module(x) - expected).norm() < (0.3 if kind == "nf4" else 1e-5) * expected.norm()
    torch.testing.assert_close(module.bias, bias * flat["a"])
    module.unmerge()
    assert torch.equal(module.bias, bias) and module.merged_adapters == ()
    torch.testing.assert_close(module.base.snapshot_weight(), weight, rtol=0, atol=0)


def test_hooks_on_the_base_and_another_compute_dtype():
    module = layer("nf4", compute_dtype=torch.bfloat16)
    x = torch.randn(2, 24)
    before = module(x)
    assert before.dtype == torch.float32
    torch.testing.assert_close(before, module.base_layer(x) * module.ia3_l["a"].T, rtol=2e-2, atol=2e-2)
    module.base_layer.register_forward_hook(lambda m, i, o: o + 1)
    torch.testing.assert_close(module(x), before + module.ia3_l["a"].T, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", BASES)
def test_autocast(kind):
    module = layer(kind)
    x = torch.randn(4, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and module.ia3_l["a"].grad.dtype == torch.float32


def test_an_infinite_bias_is_seen_before_merging():
    module = layer(dtype=torch.float16)
    with torch.no_grad():
        module.ia3_l["a"].fill_(1e4), module.bias.fill_(10.0), module.base_layer.weight.fill_(0.1)
    module.check_merge(["a"], safe=False)
    with pytest.raises(ValueError, match="gives NaN or infinities in torch.float16"):
        module.check_merge(["a"], safe=True)


def scaled_sides(model):
    """{path: "input" or "output"}"""
    return {
        path.removeprefix("base_model.model."): "input" if m.feedforward["default"] else "output"
        for path, m in model.named_modules()
        if isinstance(m, IA3Linear)
    }


def test_the_line_of_the_tutorials(tmp_path):
    config = pf.IA3Config(
        task_type="CAUSAL_LM", target_modules=["query_key_value"], feedforward_modules=["mlp.dense_4h_to_h"]
    )
    model = pf.get_peft_model(build("bloom"), config)
    sides = scaled_sides(model)
    assert {p.split(".")[-1]: s for p, s in sides.items()} == {"query_key_value": "output", "dense_4h_to_h": "input"}
    assert len(sides) == 4
    model.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert text["target_modules"] == ["mlp.dense_4h_to_h", "query_key_value"]
    assert text["feedforward_modules"] == ["mlp.dense_4h_to_h"]
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(build("bloom"), tmp_path)
    assert theirs.peft_config["default"].feedforward_modules == {"mlp.dense_4h_to_h"}


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, {"down_proj"}),
        ({"target_modules": ["q_proj", "mlp.down_proj"]}, {"down_proj"}),  # the architecture's, by another name
        ({"target_modules": ["q_proj"]}, set()),
        ({"target_modules": "all-linear"}, {"down_proj"}),
        ({"target_modules": "all-linear", "feedforward_modules": ["mlp.up_proj"]}, {"up_proj"}),
        ({"target_modules": "all-linear", "feedforward_modules": r".*mlp\.\w+_proj"}, {"up_proj", "gate_proj", "down_proj"}),
        ({"target_modules": r".*\.(k|down)_proj", "feedforward_modules": ["down_proj"]}, {"down_proj"}),
        ({"feedforward_modules": ["up_proj"]}, {"up_proj"}),
    ],
)  # fmt: skip
def test_feedforward_modules_and_a_file_that_peft_reads(options, inputs, tmp_path):
    model = pf.get_peft_model(build("llama"), pf.IA3Config(task_type="CAUSAL_LM", **options))
    sides = scaled_sides(model)
    assert {p.split(".")[-1] for p, side in sides.items() if side == "input"} == inputs
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.uniform_(0.5, 2.0)
    model.save_pretrained(tmp_path)
    expected = model.eval()(**batch("llama")).logits
    again = pf.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert scaled_sides(again) == sides and torch.equal(again(**batch("llama")).logits, expected)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(theirs(**batch("llama")).logits, expected, rtol=1e-4, atol=2e-5)


def test_a_name_begins_at_a_dot():
    model = nn.ModuleDict({"up_dense": nn.Linear(3, 3), "dense": nn.Linear(3, 3)})
    config = pf.IA3Config(target_modules=["up_dense"], feedforward_modules=["dense"])
    adapted = pf.get_peft_model(model, config)
    assert scaled_sides(adapted) == {"up_dense": "output", "dense": "input"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_modules": ["q_prj"]}, ValueError, "near misses: q_proj"),
        ({"target_modules": ["q_proj"], "feedforward_modules": ["down_prj"]}, ValueError, "near misses: down_proj"),
        ({"target_modules": r".*q_proj", "feedforward_modules": ["down_proj"]}, ValueError, "match none of the layers"),
        ({"target_modules": r".*q_proj", "feedforward_modules": r".*x"}, ValueError, "match none of the layers"),
        ({"target_modules": ["embed_tokens"]}, ValueError, "not layers this method can adapt"),
        ({"feedforward_modules": 3}, TypeError, "IA3Config: feedforward_modules is 3"),
        ({"target_modules": [""]}, ValueError, "IA3Config: target_modules holds an empty name"),
        ({"feedforward_modules": "(("}, ValueError, "not a valid regular expression"),
        ({"init_ia3_weights": "yes"}, TypeError, "expected True or False"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_as_it_was(options, error, words):
    model = build("llama").train()
    before = snapshot(model)
    with pytest.raises(error, match=words):
        pf.get_peft_model(model, pf.IA3Config(**options))
    assert_unchanged(model, before)


def test_no_default_for_an_unknown_architecture_and_no_second_method_on_a_layer():
    with pytest.raises(ValueError, match="there is no default for Sequential"):
        pf.get_peft_model(nn.Sequential(nn.Linear(2, 2)), pf.IA3Config())
    model = pf.get_peft_model(build("llama"), pf.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj has an adapter of another method already .LoraLinear"):
        model.add_adapter("b", pf.IA3Config(target_modules=["q_proj"]))
    model.add_adapter("b", pf.IA3Config(target_modules=["k_proj"]))  # beside it they live together
    model.set_adapter(["default", "b"])
    model(**batch("llama")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def choices(seed=0, b=3, c=4, t=5, v=11):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, c, t, v, generator=generator, requires_grad=True)
    targets = torch.randint(0, v, (b, c, t), generator=generator)
    lengths = torch.randint(1, t + 1, (b, c, 1), generator=generator)
    targets[torch.arange(t) >= lengths] = -100
    return logits, targets, torch.tensor([2, 0, 3])


@pytest.mark.parametrize("length_norm", [1.0, 0.0, 0.7])
def test_tfew_losses_by_their_definition(length_norm):
    logits, targets, correct = choices()
    log_p = logits.double().log_softmax(-1)
    scores, unlikely, count, language, words = torch.zeros(3, 4, dtype=torch.float64), 0.0, 0, 0.0, 0
    for b in range(3):
        for c in range(4):
            tokens = [log_p[b, c, t, y] for t, y in enumerate(targets[b, c]) if y >= 0]
            scores[b, c] = sum(tokens) / len(tokens) ** length_norm
            if c == correct[b]:
                language, words = language - sum(tokens), words + len(tokens)
            else:
                unlikely, count = unlikely - sum(torch.log(1 - p.exp() + 1e-2) for p in tokens), count + len(tokens)
    normalized = -sum(torch.log_softmax(scores[b], 0)[correct[b]] for b in range(3)) / 3
    total = language / words + unlikely / count + normalized
    torch.testing.assert_close(choice_scores(logits, targets, length_norm).double(), scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(length_normalized_loss(logits, targets, correct, length_norm).double(), normalized)
    torch.testing.assert_close(unlikelihood_loss(logits, targets, correct).double(), unlikely / count)
    loss = tfew_loss(logits, targets, correct, length_norm)
    torch.testing.assert_close(loss.double(), total)
    (got,), (truth,) = torch.autograd.grad(loss, logits), torch.autograd.grad(total, logits)
    torch.testing.assert_close(got, truth.to(got.dtype), rtol=1e-4, atol=1e-6)


def test_tfew_at_the_edges():
    logits, targets, correct = choices()
    with torch.no_grad():
        logits[0, 1, 0] = torch.where(torch.arange(11) == targets[0, 1, 0], 200.0, 0.0)  # p = 1 of a wrong token
    bounded = unlikelihood_loss(logits, targets, correct)
    assert torch.isfinite(bounded) and torch.isinf(unlikelihood_loss(logits, targets, correct, eps=0.0))
    assert torch.isfinite(torch.autograd.grad(bounded, logits)[0]).all()
    # nothing is lost where a wrong token is improbable: 1 − p is not rounded to 1
    small = torch.zeros(1, 2, 1, 2)
    small[..., 0] = 25.0
    loss = unlikelihood_loss(small, torch.ones(1, 2, 1, dtype=torch.long), torch.tensor([0]), eps=0.0)
    assert loss.item() == pytest.approx(math.exp(-25.0), rel=1e-4)
    one = logits[:, :1], targets[:, :1], torch.zeros(3, dtype=torch.long)
    assert unlikelihood_loss(*one).item() == 0.0 and length_normalized_loss(*one).item() == 0.0
    assert tfew_loss(logits.bfloat16(), targets, correct).dtype == torch.float32
    for wrong in ((logits[:, :2], targets, correct), (logits[0], targets[0], correct), (logits, targets, correct[:2])):
        with pytest.raises(ValueError, match="T-Few: logits have shape"):
            tfew_loss(*wrong)
    with pytest.raises(ValueError, match="eps is -1"):
        unlikelihood_loss(logits, targets, correct, eps=-1)


def test_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.get_peft_model(build("llama"), pf.IA3Config(task_type="CAUSAL_LM"))
