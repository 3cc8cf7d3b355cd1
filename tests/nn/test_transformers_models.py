"""Small transformers models, quantised: they run, train through checkpointing, save and load."""

import pytest
import torch
import transformers
from torch import nn

import pyfastpeft as pf
from pyfastpeft.nn import NF4Linear, as_base_linear

# transformers 5 renames it; the old name works in every release this package supports
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:quantize_model. 2 3-D expert weights"),
]


def llama(tie=False, cls=transformers.LlamaForCausalLM, **kwargs):
    return cls(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=61, pad_token_id=0, tie_word_embeddings=tie, **kwargs,
        )
    )  # fmt: skip


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=61, n_positions=32)
    )


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4, vocab_size=61, decoder_start_token_id=0
        )
    )


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=61, num_local_experts=2,
        )
    )  # fmt: skip


MODELS = {
    # quantised: per layer and elsewhere; reasons of what else is linear
    llama: (2 * 7, {"lm_head": "in skip ('lm_head')"}),
    gpt2: (2 * 4, {"lm_head": "tied to transformer.wte.weight"}),
    bert: (2 * 6 + 1, {"classifier": "output head"}),
    t5: (
        2 * (4 + 1) + 2 * (8 + 1),
        {"encoder.block.0.layer.1.DenseReluDense.wo": "keeps it in fp32", "lm_head": "tied"},
    ),
    mixtral: (
        4,
        {"lm_head": "in skip ('lm_head')", "model.layers.0.mlp.experts.gate_up_proj": "a 3-D weight of MixtralExperts"},
    ),
}


def make(build, seed=0, **kwargs):
    torch.manual_seed(seed)
    return build(**kwargs).eval()


def batch():
    torch.manual_seed(1)
    return {"input_ids": torch.randint(1, 61, (2, 9)), "labels": torch.randint(1, 61, (2, 9))}


def inputs(model):
    given = batch()
    if isinstance(model, transformers.BertForSequenceClassification):
        given["labels"] = torch.tensor([0, 1])
    return given


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_the_quantised_model_computes_what_its_dequantised_weights_say(build):
    quantized = make(build)
    dense = make(build)
    pf.quantize_model(quantized)
    count, reasons = MODELS[build]
    report = quantized.quantization_report
    assert len(report.quantized) == count, str(report)
    for name, reason in reasons.items():
        assert reason in report.reason(name)
    for name, module in quantized.named_modules():
        if isinstance(module, NF4Linear):
            assert as_base_linear(dense.get_submodule(name)).set_weight(as_base_linear(module).get_weight()) == 0.0
    given = inputs(quantized)
    with torch.no_grad():
        mine, theirs = quantized(**given), dense(**given)
    torch.testing.assert_close(mine.logits, theirs.logits, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2, bert, t5], ids=lambda build: build.__name__)
def test_it_trains_through_the_quantised_layers(build):
    quantized, dense = make(build), make(build)
    pf.quantize_model(quantized)
    for name, module in quantized.named_modules():
        if isinstance(module, NF4Linear):
            as_base_linear(dense.get_submodule(name)).set_weight(as_base_linear(module).get_weight())
    given = inputs(quantized)
    quantized(**given).loss.backward()
    dense(**given).loss.backward()
    theirs = dict(dense.named_parameters())
    trained = 0
    for name, parameter in quantized.named_parameters():
        if parameter.is_floating_point():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=2e-5, rtol=1e-3)
            trained += 1
    assert trained > 3


class LoraLayer(nn.Module):
    """The least a method does: a base and two matrices."""

    def __init__(self, module):
        super().__init__()
        self.base_layer = module
        base = as_base_linear(module)
        self.a = nn.Parameter(torch.randn(4, base.in_features) / 8)
        self.b = nn.Parameter(torch.randn(base.out_features, 4) / 8)

    def forward(self, x):
        dropout_p = 0.3 if self.training else 0.0
        return as_base_linear(self.base_layer).forward_lora(x, self.a, self.b, 0.5, dropout_p)


def adapted(build=llama):
    model = pf.quantize_model(make(build).requires_grad_(False))
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            model.set_submodule(name, LoraLayer(module))
    return model.train()


def adapter_gradients(model):
    torch.manual_seed(2)
    model.zero_grad()
    model(**batch()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_over_a_frozen_base(use_reentrant):
    plain = adapter_gradients(adapted())
    model = adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = adapter_gradients(model)
    assert checkpointed.keys() == plain.keys() and len(plain) == 2 * 2 * 7
    for name in plain:
        assert plain[name].abs().sum() > 0
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_gradient_checkpointing_without_reentry_needs_no_input_gradient():
    plain = adapter_gradients(adapted())
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = adapter_gradients(model)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_a_training_step_lowers_the_loss_and_leaves_the_base():
    model = adapted()
    bases = {n: m.state_dict() for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    bases = {n: {k: v.clone() for k, v in s.items()} for n, s in bases.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, saved in bases.items():
        now = model.get_submodule(name).state_dict()
        assert all(torch.equal(now[key], saved[key]) for key in saved)


def test_bf16_autocast_trains_in_bf16():
    model = adapted()
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    assert seen == [torch.bfloat16]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_casting_a_quantised_model_changes_its_dense_part_only():
    model = pf.quantize_model(make(llama))
    before = model.model.layers[0].mlp.up_proj.quantized
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.quantized == before
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model(**batch()).logits.dtype == torch.bfloat16
    model.half().float()
    assert model.model.layers[0].mlp.up_proj.quantized == before


def test_generate_on_a_quantised_model():
    model = pf.quantize_model(make(llama))
    out = model.generate(batch()["input_ids"], max_new_tokens=4, do_sample=False)
    again = model.generate(batch()["input_ids"], max_new_tokens=4, do_sample=False, use_cache=False)
    assert out.shape == (2, 13) and torch.equal(out, again)


@pytest.mark.parametrize("tie", [False, True])
def test_a_saved_folder_loads_into_a_meta_model(tie, tmp_path):
    from accelerate import init_empty_weights
    from safetensors.torch import load_file

    model = pf.quantize_model(make(llama, tie=tie))
    model.save_pretrained(tmp_path)
    with init_empty_weights(include_buffers=False):
        other = llama(tie=tie).eval()
    pf.load_quantized_state_dict(other, load_file(tmp_path / "model.safetensors"))
    given = batch()
    with torch.no_grad():
        assert torch.equal(other(**given).logits, model(**given).logits)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tie
    assert other.config.quantization_config == model.config.quantization_config
    mine, theirs = other.quantization_report, model.quantization_report
    assert mine.bytes_after == theirs.bytes_after and mine.model_bytes_before == theirs.model_bytes_before
    assert mine.reason("lm_head") == "dense in the checkpoint"


def test_offloading_brings_the_bytes_in_and_out(tmp_path):
    from accelerate import disk_offload

    model = pf.quantize_model(make(llama))
    given = batch()
    with torch.no_grad():
        expected = model(**given).logits
        disk_offload(model, tmp_path, execution_device="cpu")
        layer = model.model.layers[0].mlp.up_proj
        assert layer.weight.is_meta
        assert torch.equal(model(**given).logits, expected)
        assert layer.weight.is_meta


def test_dequantised_model_saves_and_loads_as_a_plain_one(tmp_path):
    model = pf.dequantize_model(pf.quantize_model(make(llama)))
    model.save_pretrained(tmp_path)
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    given = batch()
    with torch.no_grad():
        torch.testing.assert_close(other(**given).logits, model(**given).logits)
