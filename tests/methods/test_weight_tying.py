"""ensure_weight_tying: an embedding and what shares its weight have one adapter, one trained copy, and go on sharing."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import pyfastpeft as pf
from pyfastpeft.methods.relora import merge_and_reinit
from tests.methods.contract import scatter
from tests.methods.models import BUILDERS, TASK, VOCAB, build
from tests.methods.models import batch as any_batch
from tests.methods.test_targets import assert_unchanged, snapshot


def _tied_llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _bert_mlm():
    """Its head has a bias."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


EXTRA = {"tied": _tied_llama, "mlm": _bert_mlm}
LAYER = {"tied": "q_proj", "gpt2": "c_attn", "mlm": "query", "t5": "q"}
EMBEDDING = {"tied": "embed_tokens", "gpt2": "wte", "mlm": "word_embeddings", "t5": "shared"}
KINDS = ("tied", "gpt2", "mlm", "t5")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("tests.methods.models.BUILDERS", BUILDERS | EXTRA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(?s).*(fan_in_fan_out|is_gradient_checkpointing)")
        yield


def batch(kind):
    """No padding: its row of an embedding's A has no gradient, as that of a plain embedding's weight."""
    inputs = any_batch(kind)
    return {**inputs, "input_ids": inputs["input_ids"].clamp_min(1)}


def config(kind, library=pf, names=None, **more):
    options = {"r": 2, "ensure_weight_tying": True, "task_type": TASK.get(kind)} | more
    names = [EMBEDDING[kind], LAYER[kind]] if names is None else names
    return library.LoraConfig(target_modules=names, **options)


def adapt(kind, model=None, **more):
    return scatter(pf.get_peft_model(model or build(kind), config(kind, **more)).eval(), scale=0.3)


@torch.no_grad()
def logits(model, kind):
    return model(**batch(kind)).logits


def weight_written_out(kind, model):
    """A plain model with W + s (B A)ᵀ in the shared weight, and the other layers merged by hand."""
    plain = build(kind)
    holders = dict(model.base_model.holders())
    embedding = model.get_base_model().get_input_embeddings()
    modules = dict(plain.named_modules())
    with torch.no_grad():
        shared = plain.get_input_embeddings().weight
        a, b = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
        shared += embedding.scaling["default"] * (b @ a).T
        for path, layer in holders.items():
            if modules[path].weight is not shared:
                delta = layer.get_delta_weight("default")
                modules[path].weight += delta.T if layer.fan_in_fan_out else delta
    return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [False, True], ids=["embedding", "head"])
def test_one_adapter_for_all_users_of_the_weight(kind, whole):
    """Forward, gradients and merge against the shared weight written out."""
    head = {"tied": "lm_head", "gpt2": "lm_head", "mlm": "decoder", "t5": "lm_head"}[kind]
    plain = logits(build(kind), kind)
    names = [head if whole else EMBEDDING[kind], LAYER[kind]]
    fresh = pf.get_peft_model(build(kind), config(kind, names=names)).eval()
    torch.testing.assert_close(logits(fresh, kind), plain, rtol=0, atol=0)
    model = scatter(fresh, scale=0.3)
    users = [
        h for _, h in model.base_model.holders() if h.weight is model.get_base_model().get_input_embeddings().weight
    ]
    assert len(users) == (4 if kind == "t5" else 2)
    embedding = model.get_base_model().get_input_embeddings()
    parameters = [embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]]
    assert {id(p) for user in users for p in user.adapter_parameters("default")} == {id(p) for p in parameters}
    written = weight_written_out(kind, model)
    expected = logits(written, kind)
    torch.testing.assert_close(logits(model, kind), expected, rtol=1e-4, atol=1e-5)

    written(**batch(kind)).loss.backward()
    model(**batch(kind)).loss.backward()
    truth, scaling = written.get_input_embeddings().weight.grad, embedding.scaling["default"]
    a, b = parameters
    for got, right in ((a.grad, scaling * (truth @ b).T), (b.grad, scaling * (a @ truth).T)):
        assert (got - right).norm() <= 1e-5 * right.norm()

    before = logits(model, kind)
    weight = embedding.weight.detach().clone()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, kind), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model, kind), plain)
    model.unmerge_adapter()
    assert torch.equal(embedding.weight, weight) and torch.equal(logits(model, kind), before)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged, kind), expected, rtol=1e-4, atol=1e-5)
    for left in (merged, model.unload()):
        assert left.get_input_embeddings().weight is left.get_output_embeddings().weight
        assert {type(m) for m in left.modules()} == {type(m) for m in build(kind).modules()}
    assert left.config.tie_word_embeddings and torch.equal(logits(left, kind), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_files_copies_and_training(kind, tmp_path):
    model = pf.get_peft_model(build(kind), config(kind)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(**batch(kind)).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    expected = logits(model.eval(), kind)
    torch.testing.assert_close(expected, logits(weight_written_out(kind, model), kind), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(build(kind), tmp_path)
    assert torch.equal(logits(again, kind), expected)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second"), again.delete_adapter("default")
    assert torch.equal(logits(again, kind), expected)
    for clone in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = clone(model)
        assert torch.equal(logits(twin, kind), expected)
        scatter(twin, seed=9)
        assert torch.equal(logits(model, kind), expected)
        torch.testing.assert_close(
            logits(twin, kind), logits(weight_written_out(kind, twin), kind), rtol=1e-4, atol=1e-4
        )


def test_peft_reads_ours_and_we_read_theirs(tmp_path):
    peft, kind = pytest.importorskip("peft"), "tied"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(kind), config(kind, peft)).eval()
        embedding = theirs.base_model.model.get_input_embeddings()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for tensor in (embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = adapt(kind)
        ours.save_pretrained(tmp_path / "ours")
        keys = [set(load_file(tmp_path / who / "adapter_model.safetensors")) for who in ("ours", "theirs")]
        assert keys[0] == {key for key in keys[1] if "base_layer" not in key}
        read_by_us = pf.PeftModel.from_pretrained(build(kind), tmp_path / "theirs")
        read_by_them = peft.PeftModel.from_pretrained(build(kind), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(read_by_us, kind), logits(theirs, kind), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits(read_by_them, kind), logits(ours, kind), rtol=1e-4, atol=1e-5)
        expected = logits(ours, kind)
        torch.testing.assert_close(logits(ours.merge_and_unload(), kind), expected, rtol=1e-4, atol=1e-5)
        with warnings.catch_warnings():  # PEFT 0.21.2 adds the update to the one weight once for each of its users
            warnings.simplefilter("ignore")
            assert (logits(read_by_them.merge_and_unload(), kind) - expected).abs().max() > 0.1


def test_a_file_of_pefts_without_the_head(tmp_path):
    """PEFT ties modules named embed_tokens alone: its GPT-2 adapter changes the embedding only, whatever the config says."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = scatter(peft.get_peft_model(build("gpt2"), config("gpt2", peft)).eval())
        theirs.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has nothing for lm_head.* ensure_weight_tying=False"):
            pf.PeftModel.from_pretrained(build("gpt2"), tmp_path)
        plain = config("gpt2", ensure_weight_tying=False)
        ours = pf.PeftModel.from_pretrained(build("gpt2"), tmp_path, config=plain)
        torch.testing.assert_close(logits(ours, "gpt2"), logits(theirs, "gpt2"), rtol=1e-4, atol=1e-5)


def test_a_file_whose_tie_was_lost(tmp_path):
    adapt("tied").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.lm_head.lora_B.weight"
    save_file(tensors | {key: tensors[key] + 1}, file)
    model = build("tied")
    before = snapshot(model)
    with pytest.raises(ValueError, match="lora_B.weight.* differ in the file and are one tensor here"):
        pf.PeftModel.from_pretrained(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["tied", "mlm", "t5"])
@pytest.mark.parametrize("whole", [False, True], ids=["embedding", "head"])
def test_modules_to_save(kind, whole, tmp_path):
    head = {"tied": "lm_head", "mlm": "decoder", "t5": "lm_head"}[kind]
    options = {"names": [LAYER[kind]], "modules_to_save": [head if whole else EMBEDDING[kind]]}
    model = pf.get_peft_model(build(kind), config(kind, **options))
    inner = model.get_base_model()
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in n}
    assert len(trained) == (2 if whole and kind == "mlm" else 1)  # the head's bias where the head was asked for
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(**batch(kind)).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert inner.get_input_embeddings().weight is inner.get_output_embeddings().weight
    expected = logits(model.eval(), kind)
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(build(kind), tmp_path)
    assert torch.equal(logits(again, kind), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, kind), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, kind), logits(build(kind), kind))
    merged = twin.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    torch.testing.assert_close(logits(merged, kind), expected, rtol=1e-4, atol=1e-5)
    plain = model.unload()
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert torch.equal(logits(plain, kind), logits(build(kind), kind))


def test_modules_to_save_as_peft(tmp_path):
    peft = pytest.importorskip("peft")
    options = {"names": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = scatter(peft.get_peft_model(build("tied"), config("tied", peft, **options)).eval())
        ours = scatter(pf.get_peft_model(build("tied"), config("tied", **options)).eval(), seed=4)
        ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
        keys = [set(load_file(tmp_path / who / "adapter_model.safetensors")) for who in ("ours", "theirs")]
        assert keys[0] == keys[1]
        read_by_us = pf.PeftModel.from_pretrained(build("tied"), tmp_path / "theirs")
        read_by_them = peft.PeftModel.from_pretrained(build("tied"), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(read_by_us, "tied"), logits(theirs, "tied"), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits(read_by_them, "tied"), logits(ours, "tied"), rtol=1e-4, atol=1e-5)


def test_beside_adapters_without_the_tie():
    """An adapter of the embedding alone separates the weights when it is merged, and not under another's merge."""
    model = adapt("tied")
    tied = logits(model, "tied")
    with pytest.warns(UserWarning, match="embed_tokens is adapted and shares its weight with lm_head, which stays"):
        pf.get_peft_model(build("tied"), config("tied", ensure_weight_tying=False))
    model.add_adapter("alone", config("tied", ensure_weight_tying=False, init_lora_weights=False))
    assert torch.equal(logits(model, "tied"), tied)
    model.set_adapter("alone")
    alone = logits(model, "tied")
    model.base_model.set_adapter(["default", "alone"])
    both = logits(model, "tied")
    model.merge_adapter(["default"])
    with pytest.raises(RuntimeError, match="is to have a weight of its own, and adapters"):
        model.merge_adapter(["alone"])
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="shared their weights"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model, "tied"), both, rtol=1e-4, atol=1e-5)
    inner = model.get_base_model()
    assert not inner.config.tie_word_embeddings and inner.lm_head.weight is not inner.model.embed_tokens.weight
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, "tied"), logits(build("tied"), "tied"), rtol=0, atol=0)
        assert inner.lm_head.weight is inner.model.embed_tokens.weight
    torch.testing.assert_close(logits(model, "tied"), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()  # which ties the weights again
    assert inner.config.tie_word_embeddings and inner.lm_head.weight is inner.model.embed_tokens.weight
    for name, expected in (("default", tied), ("alone", alone)):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, "tied"), expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="shared their weights"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged, "tied"), alone, rtol=1e-4, atol=1e-5)


def test_mixed_batch_combination_relora_and_compile(tmp_path):
    model = adapt("tied")
    model.add_adapter("b", config("tied", r=3, init_lora_weights=False))
    inputs = batch("tied")
    first = logits(model, "tied")
    model.set_adapter("b")
    second = logits(model, "tied")
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["default", "b"]).logits
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=1e-4, atol=1e-5)
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, -0.5], "c", "cat")
    model.base_model.set_adapter("c")
    one = model.get_base_model().get_input_embeddings()
    expected = one.get_delta_weight("default") - 0.5 * one.get_delta_weight("b")
    torch.testing.assert_close(one.get_delta_weight("c"), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.get_base_model().lm_head.get_delta_weight("c"), expected.T, rtol=1e-4, atol=1e-5)
    states = {status.name: status for status in model.get_layer_status()}
    assert states["lm_head"].requires_grad == {"default": False, "b": False, "c": True}
    model.set_adapter("default")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, "tied"), first, rtol=1e-4, atol=1e-5)
    weight = one.weight
    merge_and_reinit(model)
    assert model.get_base_model().lm_head.weight is weight
    torch.testing.assert_close(logits(model, "tied"), first, rtol=1e-4, atol=1e-5)
    scatter(model)
    with pytest.warns(UserWarning, match="changed by ReLoRA"):
        model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = pf.PeftModel.from_pretrained(build("tied"), tmp_path)
    torch.testing.assert_close(logits(again, "tied"), logits(model, "tied"), rtol=1e-5, atol=1e-6)


def test_a_4_bit_model_generates_and_checkpoints(tmp_path):
    """The tied head stays dense, beside 4-bit layers."""
    model = pf.get_peft_model(pf.quantize_model(build("tied", dtype=torch.bfloat16)), config("tied"))
    scatter(model, scale=0.05)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()(**batch("tied")).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[1][name], expected) for name, expected in gradients[0].items())
    ids = batch("tied")["input_ids"]
    out = model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(model(input_ids=out[:, :-1]).logits.argmax(-1)[:, -3:], out[:, -3:])
    expected = logits(model, "tied")
    assert expected.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(pf.quantize_model(build("tied", dtype=torch.bfloat16)), tmp_path)
    assert torch.equal(logits(again, "tied"), expected)
    plain = model.merge_and_unload(dtype=torch.bfloat16)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert (logits(plain, "tied") - expected).norm() <= 0.05 * expected.norm()


class Plain(nn.Module):
    """No transformers model: three users of one weight."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6))
        self.head, self.other = nn.Linear(6, 11), nn.Embedding(11, 6)
        self.head.weight = self.other.weight = self.inner[0].weight

    def forward(self, ids):
        return self.head(self.inner(ids) + self.other(ids))


@pytest.mark.parametrize("names", [["head"], "other", "all-linear", r"inner\.0|inner\.1"])
def test_any_module(names):
    torch.manual_seed(0)
    plain = Plain().double()
    ids = torch.tensor([[1, 5, 5], [0, 9, 10]])
    model = pf.get_peft_model(
        copy.deepcopy(plain),
        pf.LoraConfig(r=2, target_modules=names, ensure_weight_tying=True, init_lora_weights=False),
    )
    inner = model.get_base_model()
    with torch.no_grad():
        plain.inner[0].weight += inner.inner[0].get_delta_weight("default").T
        if hasattr(inner.inner[1], "lora_A"):
            plain.inner[1].weight += inner.inner[1].get_delta_weight("default")
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-10, atol=1e-10)
    merged = model.merge_and_unload()
    assert merged.head.weight is merged.inner[0].weight is merged.other.weight
    torch.testing.assert_close(merged(ids), plain(ids), rtol=1e-10, atol=1e-10)


BAD = {
    "dora": ({"use_dora": True}, "DoRA scales an embedding's features but a head's tokens"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save trains it whole; choose one"),
    "flag": ({"ensure_weight_tying": "yes"}, "ensure_weight_tying"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_leaves_the_model_as_it_was(options, message):
    model = build("tied")
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        pf.get_peft_model(model, config("tied", **options))
    assert_unchanged(model, before)


def test_nothing_to_tie_is_said():
    for kind, names, message in (
        ("llama", ["q_proj"], "no embedding of the model shares its weight"),
        ("tied", ["q_proj"], "no tied module is adapted or saved"),
    ):
        with pytest.warns(UserWarning, match=message):
            pf.get_peft_model(build(kind), config(kind, names=names))
    with pytest.raises(NotImplementedError, match="ensure_weight_tying"):
        pf.AdaLoraConfig(ensure_weight_tying=True, total_step=10)


def test_trainable_tokens_follow_anyway():
    """Rows of a tied embedding are the head's with and without the option."""
    outputs = []
    for tying in (False, True):
        model = pf.get_peft_model(
            build("tied"),
            config("tied", names=["q_proj"], trainable_token_indices=[1, 4], ensure_weight_tying=tying),
        )
        outputs.append(logits(scatter(model).eval(), "tied"))
    assert torch.equal(*outputs)
