"""4-bit layers and models travel between bitsandbytes and here, both ways, by their state dicts and saved folders."""

import json

import pytest
import torch
import transformers
from torch import nn

import pyfastpeft as pf
from pyfastpeft.nn import NF4Linear

bnb = pytest.importorskip("bitsandbytes")

K, N = 128, 133  # 266 blocks of 64: two nested ones; bitsandbytes' AVX-512 decodes wrongly where 64 does not divide K
STATE = "weight.quant_state.bitsandbytes__"


def dense(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def theirs(linear, quant_type="nf4", nested=True, storage=torch.uint8):
    layer = bnb.nn.Linear4bit(
        K, N, bias=linear.bias is not None, compress_statistics=nested, quant_type=quant_type, quant_storage=storage,
        compute_dtype=torch.float32,
    )  # fmt: skip
    layer.load_state_dict(linear.state_dict())
    layer.weight.data = layer.weight.data.to(linear.weight.dtype)
    return layer.to("cpu")


def their_weight(layer):
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_their_layer_loads_here(quant_type, nested, dtype):
    layer = theirs(dense(dtype), quant_type, nested)
    mine = NF4Linear(K, N)
    mine.load_state_dict(layer.state_dict())
    assert (mine.quant_type, mine.double_quant, mine.quantized_dtype) == (quant_type, nested, dtype)
    assert torch.equal(pf.ops.dequantize_4bit(mine.quantized, dtype=dtype), their_weight(layer))
    assert torch.equal(mine.bias.to(dtype), layer.bias.to(dtype))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_their_other_storages_hold_the_same_bytes(storage):
    layer = theirs(dense(), storage=storage)
    mine = NF4Linear(K, N)
    mine.load_state_dict(layer.state_dict())
    assert torch.equal(pf.ops.dequantize_4bit(mine.quantized), their_weight(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_our_layer_loads_there(quant_type, nested, dtype):
    mine = NF4Linear.from_linear(dense(dtype), double_quant=nested, quant_type=quant_type)
    saved = mine.state_dict()
    statistics = {key: value for key, value in saved.items() if key.startswith("weight.")}
    layer = bnb.nn.Linear4bit(K, N, compute_dtype=torch.float32, quant_type=quant_type)
    layer.weight = bnb.nn.Params4bit.from_prequantized(saved["weight"], statistics, device="cpu", module=layer)
    layer.bias = nn.Parameter(saved["bias"].float())
    assert layer.weight.quant_state.dtype == dtype
    assert torch.equal(their_weight(layer), pf.ops.dequantize_4bit(mine.quantized))
    x = torch.randn(3, K)
    torch.testing.assert_close(
        layer.train()(x), mine.float()(x), atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2
    )


@pytest.mark.parametrize("nested", [True, False])
def test_the_state_dicts_are_alike(nested):
    linear = dense(torch.bfloat16)
    mine = NF4Linear.from_linear(linear, double_quant=nested).state_dict()
    other = theirs(linear, nested=nested).state_dict()
    assert mine.keys() == other.keys()
    for key, value in other.items():
        assert (mine[key].shape, mine[key].dtype) == (value.shape, value.dtype) or key.startswith((STATE, "bias")), key
    for key in ("weight", "weight.quant_map") + (("weight.nested_quant_map",) if nested else ("weight.absmax",)):
        assert torch.equal(mine[key], other[key]), key
    a, b = (json.loads(bytes(d[f"{STATE}nf4"].tolist())) for d in (mine, other))
    assert a.keys() == b.keys()
    assert a.pop("nested_offset", 0) == pytest.approx(b.pop("nested_offset", 0), rel=1e-6)
    assert a == b


def llama_config():
    return transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip


def gpt2_config():
    return transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=61, n_positions=32)


def model_of(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(model):
    torch.manual_seed(1)
    model.train()  # their CPU inference path repacks the weight in place and computes in bf16
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        return model(input_ids=torch.randint(1, 61, (2, 7))).logits


@pytest.mark.parametrize("config", [llama_config, gpt2_config])
def test_a_folder_saved_here_loads_with_transformers_and_bitsandbytes(config, tmp_path):
    model = pf.quantize_model(model_of(config()))
    model.save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    layers = {name for name, m in other.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert layers == {name for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    torch.testing.assert_close(logits(other), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("nested", [True, False])
def test_a_folder_saved_by_transformers_and_bitsandbytes_loads_here(nested, tmp_path):
    from safetensors.torch import load_file

    config = llama_config()
    model_of(config).save_pretrained(tmp_path / "dense")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=quantization, device_map="cpu"
    )
    other.save_pretrained(tmp_path / "quantized")
    model = pf.load_quantized_state_dict(model_of(config), load_file(tmp_path / "quantized" / "model.safetensors"))
    layers = [name for name, m in model.named_modules() if isinstance(m, NF4Linear)]
    assert len(layers) == 14 and model.get_submodule(layers[0]).double_quant == nested
    for name in layers:
        their = other.get_submodule(name)
        q = model.get_submodule(name).quantized
        assert torch.equal(pf.ops.dequantize_4bit(q), their_weight(their)), name
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-5)
