"""The contract every method keeps: walks the registry, on five architectures, dense and 4-bit."""

import copy
import dataclasses
import inspect
import json
import pickle
import warnings

import pytest
import torch

import pyfastpeft as pf
from pyfastpeft.methods.base import AdapterHolder, PeftType
from pyfastpeft.methods.registry import METHODS, config_class_for, method_for
from tests.methods.contract import CONTRACTS, KINDS, adapted, base_model, config, scatter
from tests.methods.models import batch
from tests.methods.test_targets import assert_unchanged, snapshot

BASES = ("dense", "nf4")
CASES = [(m, kind, base) for m, c in CONTRACTS.items() for kind in c.kinds for base in BASES]
EACH = pytest.mark.parametrize(
    ("method", "kind", "base"), CASES, ids=[f"{m.value}-{kind}-{base}" for m, kind, base in CASES]
)
METHOD = pytest.mark.parametrize("method", CONTRACTS, ids=[m.value for m in CONTRACTS])


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "(?s).*(fan_in_fan_out|shares (its|a) weight|weight of its own|quantising again)"
        )
        yield


def logits(model, kind):
    with torch.no_grad():
        return model(**batch(kind)).logits


def test_every_method_has_a_contract():
    assert set(CONTRACTS) == set(METHODS)


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="peft_type is 'VERA', expected one of .*LORA"):
        method_for("VERA")


@METHOD
def test_config_class_and_fields(method):
    mine = config(method, "llama")
    assert mine.peft_type == method and config_class_for(method.value) is type(mine)
    assert type(mine)(**mine.to_dict()) == mine
    fields = {field.name for field in dataclasses.fields(mine)}
    assert all(name in mine.to_dict() or getattr(mine, name) is None for name in fields)
    assert getattr(pf, type(mine).__name__) is type(mine)


@EACH
def test_life_of_an_adapter(method, kind, base, tmp_path):
    """bf16: new, trained a step, disabled, saved, loaded, loaded once more beside itself, taken out."""
    plain_model = base_model(kind, base, torch.bfloat16)
    plain = logits(plain_model, kind)
    model = pf.get_peft_model(plain_model, config(method, kind)).eval()
    if CONTRACTS[method].identity:
        assert torch.equal(logits(model, kind), plain)
    scatter(model)
    tensors = model.base_model.tensors("default")
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert 0 < len(trained) <= len(tensors)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = model.train()(**batch(kind))
    output.loss.backward()
    optimizer.step()
    assert output.logits.dtype == torch.bfloat16
    parameters = dict(model.named_parameters())
    assert all(p.grad is None for n, p in parameters.items() if n in frozen)
    assert all(torch.equal(parameters[n], value) for n, value in frozen.items())
    still = [n for n, value in trained.items() if torch.equal(parameters[n], value)]
    assert not still, f"not trained: {still}"

    changed = logits(model.eval(), kind)
    assert changed.dtype == torch.bfloat16 and not torch.equal(changed, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model, kind), plain)
    assert torch.equal(logits(model, kind), changed)
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(base_model(kind, base, torch.bfloat16), tmp_path)
    for key, tensor in again.base_model.tensors("default").items():
        assert torch.equal(tensor, tensors[key]), key
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(logits(again, kind), changed)
    again.load_adapter(tmp_path, "second", is_trainable=True)
    again.set_adapter("second")
    assert torch.equal(logits(again, kind), changed)
    again.delete_adapter("default")
    assert torch.equal(logits(again, kind), changed)
    assert torch.equal(logits(model.unload(), kind), plain)


@EACH
def test_gradients(method, kind, base):
    """Every parameter's gradient against torch's autograd in fp64 on the weights that the base stands for."""
    model = scatter(adapted(method, kind, base))
    twin = adapted(method, kind, "decoded" if base == "nf4" else "dense", torch.float64)
    with torch.no_grad():
        for key, tensor in twin.base_model.tensors("default").items():
            tensor.copy_(model.base_model.tensors("default")[key])
    gradients = []
    for each in (model, twin):
        each(**batch(kind)).loss.backward()
        gradients.append({k: t.grad for k, t in each.base_model.tensors("default").items() if t.requires_grad})
    assert gradients[0] and set(gradients[0]) == set(gradients[1])
    for key, truth in gradients[1].items():
        got = gradients[0][key]
        assert got is not None and truth.norm() > 0, key
        assert (got.double() - truth).norm() <= 2e-4 * truth.norm() + 1e-7, key


@EACH
def test_merging(method, kind, base):
    model = scatter(adapted(method, kind, base))
    if not CONTRACTS[method].mergeable:
        before = snapshot(model)
        for call in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="cannot be merged"):
                call()
        assert_unchanged(model, before)
        return
    before, weights = logits(model, kind), {n: p.detach().clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    merged = logits(model, kind)
    assert (merged - before).norm() <= (0.4 if base == "nf4" else 1e-5) * before.norm()
    with model.disable_adapter():
        assert not torch.equal(logits(model, kind), merged)
    assert torch.equal(logits(model, kind), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model, kind), before)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    if base == "nf4":
        twin = copy.deepcopy(model).merge_and_unload(dtype=torch.float32)
        assert not any(isinstance(m, pf.nn.NF4Linear | AdapterHolder) for m in twin.modules())
        torch.testing.assert_close(logits(twin, kind), before, rtol=1e-4, atol=1e-5 * before.abs().max().item())
    plain = model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(plain, kind), merged)
    if base == "nf4" and not CONTRACTS[method].exact_merge:
        assert plain.merge_report and all(0 < error < 0.2 for error in plain.merge_report.values())
    assert {type(m) for m in plain.modules()} == {type(m) for m in base_model(kind, base).modules()}


PEFT_CASES = [(m, kind) for m, c in CONTRACTS.items() if c.peft for kind in c.peft_kinds]


@pytest.mark.parametrize(("method", "kind"), PEFT_CASES, ids=[f"{m.value}-{kind}" for m, kind in PEFT_CASES])
def test_peft_reads_ours_and_we_read_theirs(method, kind, tmp_path):
    peft = pytest.importorskip("peft")
    ours = scatter(adapted(method, kind))
    theirs = scatter(peft.get_peft_model(base_model(kind), config(method, kind, peft)).eval(), seed=3)
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    texts = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert set(texts[0]) == set(texts[1])
    read_by_them = peft.PeftModel.from_pretrained(base_model(kind), tmp_path / "ours").eval()
    read_by_us = pf.PeftModel.from_pretrained(base_model(kind), tmp_path / "theirs")
    inputs = batch(kind)
    labels = inputs.pop("labels")  # PEFT's AdaLoRA cannot take them when loaded for inference
    if kind == "t5":
        inputs["decoder_input_ids"] = labels
    with torch.no_grad():
        for got, expected in ((read_by_them, ours), (read_by_us, theirs)):
            torch.testing.assert_close(got(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=2e-5)


@METHOD
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bloom"])
def test_generate_is_forward(method, kind):
    """Greedy decoding with the cache gives the tokens that argmax over whole forwards gives."""
    if kind not in CONTRACTS[method].kinds:
        pytest.skip("not served")
    model = scatter(adapted(method, kind), scale=0.3)
    prompt = batch(kind)["input_ids"][:, :5]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    tokens = torch.zeros(len(prompt), 1, dtype=torch.long) if kind == "t5" else prompt
    for _ in range(4):
        inputs = {"input_ids": prompt, "decoder_input_ids": tokens} if kind == "t5" else {"input_ids": tokens}
        with torch.no_grad():
            # where virtual tokens precede the text their logits may come first
            step = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits[:, -1]
        tokens = torch.cat([tokens, step.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(got, tokens)


@EACH
def test_gradient_checkpointing_gives_the_same_gradients(method, kind, base):
    def gradients(checkpointing):
        model = scatter(adapted(method, kind, base)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(**batch(kind)).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        # a key's bias changes nothing behind a softmax: its gradient is rounding alone
        assert (checkpointed[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@METHOD
@pytest.mark.parametrize("base", BASES)
def test_copies_pickles_and_state_dicts(method, base):
    model = scatter(adapted(method, "llama", base))
    before = logits(model, "llama")
    for clone in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = clone(model)
        assert torch.equal(logits(twin, "llama"), before)
        assert list(twin.state_dict()) == list(model.state_dict())
        assert inspect.signature(twin.forward) == inspect.signature(model.forward)
        scatter(twin, seed=9)
        assert torch.equal(logits(model, "llama"), before) and not torch.equal(logits(twin, "llama"), before)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(logits(twin, "llama"), before)
    other = scatter(adapted(method, "llama", base), seed=5)
    assert list(other.state_dict()) == list(model.state_dict())


@METHOD
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="transformers 5 compiles its masks with torch 2.7 or newer"
)
def test_compiles(method, kind, monkeypatch):
    monkeypatch.setattr("tests.methods.models.LAYERS", 2 if kind == "llama" else 1)
    torch._dynamo.reset()
    model = scatter(adapted(method, kind)).train()
    inputs = batch(kind)
    expected = model(**inputs)
    expected.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    got = torch.compile(model, backend="aot_eager")(**inputs)
    got.loss.backward()
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        assert (dict(model.named_parameters())[name].grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    torch._dynamo.reset()


@METHOD
def test_a_failure_half_way_leaves_the_model_as_it_was(method, monkeypatch):
    """The last parameter that the method registers cannot be had."""
    models = [base_model("llama").train() for _ in range(2)]
    before = snapshot(models[1])
    calls, limit = [], None
    register = torch.nn.Module.register_parameter

    def counting(self, name, parameter):
        calls.append(name)
        if len(calls) == limit:
            raise MemoryError("no memory")
        return register(self, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", counting)
    pf.get_peft_model(models[0], config(method, "llama"))
    limit = len(calls)
    calls.clear()
    with pytest.raises(MemoryError):
        pf.get_peft_model(models[1], config(method, "llama"))
    monkeypatch.undo()
    assert limit and not any(isinstance(module, AdapterHolder) for module in models[1].modules())
    assert_unchanged(models[1], before)


def test_kinds_are_those_that_the_issue_names():
    assert KINDS == ("llama", "gpt2", "bert", "t5", "bloom") and PeftType.LORA in CONTRACTS
