"""QLoRA: our NF4 base against PEFT on the dense weights it decodes to, and against PEFT on bitsandbytes' own layers."""

import copy
import warnings

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from tests.methods.models import TASK, batch, build, randomise_adapters

peft = pytest.importorskip("peft")
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapt(library, base, kind, **config):
    torch.manual_seed(5)
    model = library.get_peft_model(base, library.LoraConfig(task_type=TASK[kind], **{**CONFIG, **config}))
    randomise_adapters(model)
    return model


def smooth(model):
    """T5's ReLU made GELU: a unit that one rounding puts above zero and another below changes gradients by all of it."""
    for module in model.modules():
        if isinstance(getattr(module, "act", None), nn.ReLU):
            module.act = nn.GELU()
    return model


def run(model, kind):
    output = model(**batch(kind))
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
    return {"logits": output.logits.detach()} | gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_equal_to_peft_on_the_decoded_weights(kind, dtype):
    """Truth: PEFT in fp64 on the decoded weights. Ours may be off by at most twice what PEFT is in the same dtype."""
    quantized = pf.quantize_model(smooth(build(kind, dtype=dtype)))
    dense = pf.dequantize_model(copy.deepcopy(quantized), dtype)
    truth = run(adapt(peft, copy.deepcopy(dense), kind).double(), kind)
    # the peer keeps its adapters in the base's dtype: with fp32 ones it would compute the low-rank path in fp32
    theirs = run(adapt(peft, dense, kind).to(dtype), kind)
    ours = run(adapt(pf, quantized, kind), kind)
    assert set(ours) == set(theirs) == set(truth) and len(truth) > 8
    assert ours["logits"].dtype == dtype
    slack = {torch.float32: 5e-6, torch.bfloat16: 4e-3}[dtype]
    for name, exact in truth.items():
        error, allowed = ((r[name].double() - exact).norm() for r in (ours, theirs))
        assert error <= 2 * allowed + slack * exact.norm(), (name, error, allowed, exact.norm())


def test_files_of_a_quantised_model_load_on_a_dense_one_and_the_other_way(tmp_path):
    quantized = pf.quantize_model(build("llama"))
    dense = pf.dequantize_model(copy.deepcopy(quantized), torch.float32)
    inputs = batch("llama")
    ours = adapt(pf, quantized, "llama").eval()
    expected = ours(**inputs).logits
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "ours")
    torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=1e-4, atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = pf.PeftModel.from_pretrained(pf.quantize_model(build("llama")), tmp_path / "theirs")
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-4, atol=2e-5)


def test_equal_to_peft_on_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")

    def to_bnb(model):
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.float32,
                    compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
                new.weight = bnb.nn.Params4bit(
                    module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, new)
        model.is_loaded_in_4bit = True
        return model.to("cpu")

    # in training mode: in eval mode bitsandbytes repacks its weights in place on some CPUs
    config = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    theirs = adapt(peft, to_bnb(build("llama_wide")), "llama_wide", **config).train()
    ours = adapt(pf, pf.quantize_model(build("llama_wide")), "llama_wide", **config).train()
    assert "bnb" in type(theirs.get_base_model().model.layers[0].self_attn.q_proj).__module__
    expected, got = run(theirs, "llama_wide"), run(ours, "llama_wide")
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-3 * value.norm(), name  # their double quantisation has no exact zero
