"""Prefix tuning where attentions take no cache: DistilBERT and ViT."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import pyfastpeft as pf
from tests.methods.models import VOCAB
from tests.methods.test_prefix_tuning import V
from tests.methods.test_targets import assert_unchanged, snapshot

HEADS, WIDTH = 4, 32


def distilbert(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    sizes = {"dim": WIDTH, "hidden_dim": 48, "n_layers": 2, "n_heads": HEADS, "max_position_embeddings": 16}
    config = tf.DistilBertConfig(vocab_size=VOCAB, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, **sizes)
    model = tf.DistilBertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.to(dtype)


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 48}
    config = tf.ViTConfig(
        image_size=16, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    return tf.ViTForImageClassification(config).eval()


def inputs():
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 2, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 1])}


def adapted(base, **config):
    return pf.get_peft_model(base, pf.PrefixTuningConfig(num_virtual_tokens=V, task_type="SEQ_CLS", **config)).eval()


def with_reference(model):
    """The base of `model` with attentions written out here, which put the prefix before the keys themselves."""
    base = copy.deepcopy(model).unload()
    prefix = model.prefix_encoder["default"]().detach()  # [v, layers * 2 * width]
    for layer, block in enumerate(base.distilbert.transformer.layer):
        attention = block.attention
        keys, values = prefix[:, 2 * layer * WIDTH : 2 * (layer + 1) * WIDTH].split(WIDTH, dim=1)

        def forward(hidden_states, attention_mask=None, a=attention, k=keys, v=values, **kwargs):
            rows = len(hidden_states)
            parts = [a.q_lin(hidden_states), a.k_lin(hidden_states), a.v_lin(hidden_states)]
            parts[1], parts[2] = (
                torch.cat([p.expand(rows, -1, -1), x], 1) for p, x in zip((k, v), parts[1:], strict=True)
            )
            q, key, value = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in parts)
            scores = q @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
            seen = F.pad(inputs()["attention_mask"].bool(), (V, 0), value=True)[:, None, None]
            y = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
            return a.out_lin(y.transpose(1, 2).flatten(2)), None

        attention.forward = forward
    return base


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("projection", [False, True])
def test_distilbert(attention, projection, tmp_path):
    base = distilbert()
    base.set_attn_implementation(attention)
    plain = base(**inputs()).logits
    model = adapted(base, prefix_projection=projection, encoder_hidden_size=12 if projection else None)
    config = model.peft_config["default"]
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == (2, HEADS, WIDTH)
    y = model(**inputs()).logits
    assert (y - plain).abs().max() > 1e-3
    torch.testing.assert_close(y, with_reference(model)(**inputs()).logits, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model(**inputs()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.prefix_encoder.parameters())
    with model.disable_adapter():
        assert torch.equal(model(**inputs()).logits, plain)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs()).logits, y)
        next(other.prefix_encoder.parameters()).data.add_(1)
        assert not torch.equal(other(**inputs()).logits, y) and torch.equal(model(**inputs()).logits, y)
    model.save_pretrained(tmp_path)
    fresh = distilbert()
    fresh.set_attn_implementation(attention)
    again = pf.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(again(**inputs()).logits, y)
    # the model's choice of attention is looked up at each call
    other = {"sdpa": "eager", "eager": "sdpa"}[attention]
    model.get_base_model().set_attn_implementation(other)
    torch.testing.assert_close(model(**inputs()).logits, y, rtol=1e-4, atol=1e-5)
    model.get_base_model().set_attn_implementation(attention)
    back = model.unload()
    assert type(back.distilbert.transformer.layer[0].attention.config) is tf.DistilBertConfig
    assert "pyfastpeft" not in back.config.to_json_string()


def test_every_column_has_a_gradient_with_checkpointing_bf16_and_compiled():
    model = adapted(distilbert())
    model(**inputs()).loss.backward()
    weight = model.prefix_encoder["default"].embedding.weight
    plain = weight.grad.clone()
    assert plain.any(dim=0).all() and plain.any(dim=1).all()
    model.zero_grad()
    model.train().gradient_checkpointing_enable()
    model(**inputs()).loss.backward()
    torch.testing.assert_close(weight.grad, plain, rtol=1e-5, atol=1e-7)
    narrow = adapted(distilbert(dtype=torch.bfloat16))
    assert narrow(**inputs()).logits.dtype == torch.bfloat16
    assert narrow.prefix_encoder["default"].embedding.weight.dtype == torch.float32
    fresh = adapted(distilbert())
    expected = fresh(**inputs()).logits
    torch._dynamo.reset()
    got = torch.compile(fresh, backend="aot_eager")(**inputs()).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_the_text_keeps_its_positions():
    """All 16 that the model has: the prefix takes none of them."""
    model = adapted(distilbert())
    assert torch.isfinite(model(input_ids=torch.arange(16)[None]).logits).all()


def test_vit_and_beside_lora_and_saved_attentions(tmp_path):
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    base = vit()
    plain = base(pixel_values=pixels).logits
    model = pf.get_peft_model(base, pf.PrefixTuningConfig(num_virtual_tokens=V))
    y = model(pixel_values=pixels).logits
    assert (y - plain).abs().max() > 1e-3
    text = adapted(distilbert(), modules_to_save=["layer.1.attention"])
    alone = adapted(distilbert())
    for each in (text, alone):  # a saved attention follows the prefix as it is trained
        each.prefix_encoder["default"].embedding.weight.data.copy_(torch.arange(4.0 * 128).view(4, 128).sin())
    torch.testing.assert_close(text(**inputs()).logits, alone(**inputs()).logits)
    text.add_adapter("low", pf.LoraConfig(target_modules=["q_lin", "k_lin"], init_lora_weights=False))
    z = text(**inputs()).logits
    text.base_model.set_adapter(["default", "low"])
    both = text(**inputs()).logits
    assert not torch.equal(both, z)
    text.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(distilbert(), tmp_path)
    assert torch.equal(again(**inputs()).logits, z)


def test_a_model_left_as_it_was():
    base = distilbert()
    before = snapshot(base)
    with pytest.raises(ValueError, match="num_layers is 3, the model has 2"):
        adapted(base, num_layers=3)
    assert_unchanged(base, before)
    assert isinstance(base.distilbert.transformer.layer[0].attention.config, tf.DistilBertConfig)
    with pytest.raises(ValueError, match="nor one by transformers' registry"):
        pf.get_peft_model(nn.Linear(3, 3), pf.PrefixTuningConfig(num_virtual_tokens=V))
