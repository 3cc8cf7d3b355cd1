"""PeftModel: several adapters, disabling, merging, copies, what trains, and any model."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from pyfastpeft.methods.lora import LoraLinear
from tests.methods.models import TASK, batch, build, randomise_adapters


def adapted(kind="llama", dtype=torch.float32, quantize=False, **config):
    """A model with one adapter "default" of random values, in eval mode."""
    base = build(kind, dtype=dtype)
    if quantize:
        base = pf.quantize_model(base)
    config = {"target_modules": "all-linear", "r": 4, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = pf.get_peft_model(base, pf.LoraConfig(task_type=TASK.get(kind), **config)).eval()
    randomise_adapters(model)
    return model


def logits(model, kind="llama"):
    with torch.no_grad():
        return model(**batch(kind)).logits


class Mlp(nn.Module):
    """Any nn.Module: no config, and one layer reached by two paths."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.last = nn.Linear(6, 3)

    def forward(self, values):
        return self.last(self.again(self.first(values).relu()))


def test_a_new_adapter_changes_nothing():
    base = build("llama")
    before = logits(base)
    model = pf.get_peft_model(base, pf.LoraConfig(target_modules="all-linear"))
    assert torch.equal(logits(model), before)


def test_the_sum_of_two_adapters():
    model = adapted()
    only_first = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.add_adapter("second", pf.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_alpha=3))
    assert torch.equal(logits(model), only_first)  # not active yet
    model.set_adapter("second")
    randomise_adapters(model, seed=9)
    only_second = logits(model)
    model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, only_first) and not torch.allclose(both, only_second)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    update = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    torch.testing.assert_close(layer(x), x @ (layer.weight + update).T, rtol=1e-4, atol=1e-5)
    model.delete_adapter("second")
    assert torch.equal(logits(model), only_first)
    assert model.active_adapters == ["default"]
    model.delete_adapter("default")
    assert torch.equal(logits(model), base)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())


def test_two_adapters_with_dropout_have_masks_of_their_own():
    model = pf.get_peft_model(Mlp(), pf.LoraConfig(target_modules=["last"], lora_dropout=0.5, r=2))
    model.add_adapter("b", pf.LoraConfig(target_modules=["last"], lora_dropout=0.5, r=2))
    model.set_adapter(["default", "b"])
    layer = model.get_base_model().last.train()
    with torch.no_grad():
        for name, column in (("default", 0), ("b", 1)):
            layer.lora_A[name].weight.fill_(0.0)[0, 0] = 1.0
            layer.lora_B[name].weight.fill_(0.0)[column, 0] = 1 / layer.scaling[name]
        x = torch.zeros(4000, 6)
        x[:, 0] = 1.0
        y = layer(x) - layer.base_layer(x)
    kept = (y[:, :2] > 1.0).float()
    assert (kept.mean(0) - 0.5).abs().max() < 0.04
    assert abs((kept[:, 0] * kept[:, 1]).mean() - 0.25) < 0.04  # independent


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_exact_unmerge(dtype, quantize):
    model = adapted(dtype=dtype, quantize=quantize)
    before = logits(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(safe_merge=True)
        merged = logits(model)
        model.merge_adapter()  # nothing left to merge
        assert torch.equal(logits(model), merged)
        with model.disable_adapter():
            assert not torch.equal(logits(model), merged)
        assert torch.equal(logits(model), merged)
    assert not torch.equal(merged, before)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.03}[dtype] if not quantize else 0.4
    assert (merged - before).norm() < tolerance * before.norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_merge_and_unload(kind):
    model = adapted(kind, **({"bias": "all"} if kind == "gpt2" else {}))
    before = logits(model, kind)
    plain = model.merge_and_unload(progressbar=True, safe_merge=True)
    assert type(plain) is type(build(kind))
    assert {type(m) for m in plain.modules()} == {type(m) for m in build(kind).modules()}
    assert not any("lora" in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain, kind), before, rtol=1e-4, atol=1e-5 * before.abs().max().item())


def test_merging_into_4_bits_says_what_it_costs_and_into_16_bits_does_not_cost_it():
    model = adapted(quantize=True, dtype=torch.bfloat16)
    before = logits(model)
    twin = copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match=r"quantising again changed the merged weights by \d+\.\d+% on average.*bfloat16"
    ):
        plain = model.merge_and_unload()
    assert len(plain.merge_report) == 14 and all(0.01 < e < 0.2 for e in plain.merge_report.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense = twin.merge_and_unload(dtype=torch.bfloat16)
    assert {type(m) for m in dense.modules()} == {type(m) for m in build("llama").modules()}
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    assert not hasattr(dense.config, "quantization_config") and not hasattr(dense, "merge_report")
    assert (logits(dense) - before).norm() < 0.1 * (logits(plain) - before).norm()
    with pytest.raises(TypeError, match="floating-point dtype"):
        adapted(quantize=True).merge_and_unload(dtype=torch.int8)


def test_16_bit_merge_also_makes_layers_without_an_adapter_dense():
    dense = adapted(quantize=True, target_modules=["q_proj"]).merge_and_unload(dtype=torch.float32)
    assert not any(isinstance(m, pf.nn.NF4Linear) for m in dense.modules())


def test_merging_a_broken_adapter_is_refused_and_nothing_is_merged():
    model = adapted()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[3, 1] = torch.nan
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.down_proj: adapter 'default' has NaN.*lora_B\.weight"
    ):
        model.merge_and_unload()
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(3e38)
        layer.lora_A["default"].weight.fill_(3e38)
    with pytest.raises(ValueError, match="gives NaN or infinities in torch.float32"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


def test_a_tied_head_is_untied_by_merging():
    config = build("llama").config
    config.tie_word_embeddings = True
    base = type(build("llama"))(config)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="lm_head is adapted and shares its weight with model.embed_tokens"):
        model = pf.get_peft_model(base, pf.LoraConfig(target_modules=["lm_head"])).eval()
    randomise_adapters(model)
    before = logits(model)
    with pytest.warns(UserWarning, match="weight of its own"):
        plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-5)
    assert not plain.config.tie_word_embeddings


def test_unload_gives_the_model_back():
    base = build("bert")
    before, modules = logits(base, "bert"), {n: type(m) for n, m in base.named_modules()}
    model = pf.get_peft_model(base, pf.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    randomise_adapters(model)
    model.merge_adapter()
    plain = model.unload()
    assert plain is base and {n: type(m) for n, m in plain.named_modules()} == modules
    assert torch.equal(logits(plain.eval(), "bert"), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_bf16_stays_bf16_and_only_the_adapter_trains(kind, quantize):
    model = adapted(kind, torch.bfloat16, quantize).train()
    dtypes = []
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.register_forward_hook(lambda m, i, o: dtypes.append((i[0].dtype, o.dtype)))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    lora = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert lora and all(p.dtype == torch.float32 and p.requires_grad for p in lora.values())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    output = model(**batch(kind))
    output.loss.backward()
    optimizer.step()
    assert output.logits.dtype == torch.bfloat16
    # T5 computes some norms in fp32, so an input may be fp32; a layer never widens what it is given
    assert all(out == given for given, out in dtypes) and (torch.bfloat16, torch.bfloat16) in dtypes
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], value) for n, value in frozen.items())
    assert all(not torch.equal(parameters[n], value) for n, value in trained.items())
    assert all(parameters[n].grad.dtype == torch.float32 for n in lora)


def test_autocast_adapter_dtype_false_keeps_the_bases_dtype():
    base = build("llama", dtype=torch.bfloat16)
    model = pf.get_peft_model(base, pf.LoraConfig(target_modules="all-linear"), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.add_adapter("wide", pf.LoraConfig(target_modules=["q_proj"]))
    assert {p.dtype for n, p in model.named_parameters() if ".wide." in n} == {torch.float32}


def test_set_adapter_moves_requires_grad_and_bias_modes():
    model = adapted("gpt2", bias="lora_only", target_modules=["c_attn"])
    biases = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert biases == {n for n, _ in model.named_parameters() if n.endswith("c_attn.base_layer.bias")}
    with pytest.raises(ValueError, match="trains biases already"):
        model.add_adapter("other", pf.LoraConfig(target_modules=["c_fc"], bias="all"))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model.add_adapter("other", pf.LoraConfig(target_modules=["c_fc"]))
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.set_adapter("other")
    assert {n.split(".lora_")[1][2:] for n, p in model.named_parameters() if p.requires_grad} == {"other.weight"}
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match="keep their trained values"), model.disable_adapter():
        pass


def test_inference_mode_freezes():
    model = pf.get_peft_model(Mlp(), pf.LoraConfig(target_modules=["last"], inference_mode=True))
    assert model.get_nb_trainable_parameters()[0] == 0


def test_saved_modules_train_and_switch_with_the_adapter():
    model = adapted("bert", target_modules=["query"])
    first = logits(model, "bert")
    with model.disable_adapter():
        assert torch.equal(logits(model, "bert"), logits(build("bert"), "bert"))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n} == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    model.add_adapter("b", pf.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.set_adapter("b")
    with model.disable_adapter():
        base = logits(model, "bert")
    assert torch.equal(logits(model, "bert"), base)  # B = 0 and an untouched copy of the head
    with pytest.raises(ValueError, match="only one of them can be active"):
        model.set_adapter(["default", "b"])
    assert model.active_adapters == ["b"]
    model.set_adapter("default")
    assert torch.equal(logits(model, "bert"), first)
    assert model.get_base_model().classifier.out_features == 3  # attributes reach the active copy
    model.delete_adapter("b")
    assert torch.equal(logits(model, "bert"), first)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_copies_are_equal_and_independent(clone, quantize):
    model = adapted(quantize=quantize)
    twin = clone(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    assert list(twin.state_dict()) == list(model.state_dict())
    randomise_adapters(twin, seed=77)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    assert inspect.signature(twin.forward) == inspect.signature(model.get_base_model().forward)


def test_state_dict_round_trip():
    model, twin = adapted(), adapted()
    randomise_adapters(twin, seed=5)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))


def test_signature_attributes_and_generate_are_the_models():
    model = adapted()
    assert inspect.signature(model.forward) == inspect.signature(model.get_base_model().forward)
    assert model.config is model.get_base_model().config
    assert isinstance(model, pf.PeftModelForCausalLM)
    prompt = batch("llama")["input_ids"][:, :4]
    tokens = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(
        tokens, model.merge_and_unload().generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    )
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


def test_counts(capsys):
    model = adapted("llama", r=2, target_modules=["q_proj"])
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * (32 + 32)
    nf4 = adapted("llama", quantize=True, r=2, target_modules=["q_proj"])
    assert nf4.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    nf4.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    expected = (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
    )
    assert capsys.readouterr().out.strip() == expected


def test_any_module_and_a_layer_with_two_paths():
    base = Mlp()
    x = torch.randn(4, 6)
    model = pf.get_peft_model(base, pf.LoraConfig(target_modules=["first"], r=2))
    assert base.first is base.again and isinstance(base.first, LoraLinear)
    randomise_adapters(model)
    before = model(values=x)
    plain = model.merge_and_unload()
    assert type(plain.first) is nn.Linear and plain.first is plain.again
    torch.testing.assert_close(plain(x), before)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant, quantize):
    def gradients(checkpointing):
        model = adapted(kind, quantize=quantize, lora_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(**batch(kind)).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain and all(g is not None for g in plain.values())
    for name, gradient in plain.items():
        # T5's decoder layers add up their gradients of the encoder's output in another order
        tolerance = 1e-5 * gradient.norm().item() if kind == "t5" else 0.0
        assert (checkpointed[name] - gradient).norm().item() <= tolerance, name


def test_checkpointing_makes_the_inputs_require_grad():
    class Model(Mlp):
        calls = []

        def gradient_checkpointing_enable(self, kwargs=None):
            self.calls.append(kwargs)

        def enable_input_require_grads(self):
            self.calls.append("inputs")

    model = pf.get_peft_model(Model(), pf.LoraConfig(target_modules=["last"]))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert Model.calls == [{"use_reentrant": True}, "inputs"]


def test_checkpointing_that_was_on_before_and_prepare_for_kbit_training():
    base = pf.prepare_model_for_kbit_training(pf.quantize_model(build("llama")), True, {"use_reentrant": True})
    assert not any(p.requires_grad for p in base.parameters())
    model = pf.get_peft_model(base, pf.LoraConfig(target_modules="all-linear")).train()
    model(**batch("llama")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [("a.b", ValueError, "without dots"), ("../x", ValueError, "slashes"), ("", ValueError, "expected one"),
     ("keys", ValueError, "attribute"), (3, TypeError, "expected a string"), ("default", ValueError, "already")],
)  # fmt: skip
def test_bad_adapter_names(name, error, words):
    model = adapted()
    with pytest.raises(error, match=words):
        model.add_adapter(name, pf.LoraConfig(target_modules=["q_proj"]))


def test_wrong_use_is_named():
    model = adapted()
    for call in (model.set_adapter, model.delete_adapter, lambda n: model.merge_adapter([n])):
        with pytest.raises(ValueError, match="there is no adapter 'x', expected one of"):
            call("x")
    with pytest.raises(ValueError, match="is a PeftModel already"):
        pf.get_peft_model(model, pf.LoraConfig())
    with pytest.raises(ValueError, match="has adapters in it already"):
        pf.get_peft_model(model.get_base_model(), pf.LoraConfig())
    with pytest.raises(TypeError, match="expected a pyfastpeft config"):
        pf.get_peft_model(Mlp(), {"r": 8})
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        pf.get_peft_model("llama", pf.LoraConfig())
    model.add_adapter("b", pf.LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter(["default"])
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        model.set_adapter("b")
