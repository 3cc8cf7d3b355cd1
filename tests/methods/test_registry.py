"""The contract every method keeps: walks the registry."""

import dataclasses

import pytest
import torch

import pyfastpeft as pf
from pyfastpeft.methods.registry import METHODS, config_class_for, method_for
from tests.methods.models import batch, build, randomise_adapters


@pytest.mark.parametrize("method", METHODS.values(), ids=[t.value for t in METHODS])
def test_contract(method, tmp_path):
    config = method.config_class(task_type="CAUSAL_LM")
    assert config.peft_type == method.peft_type and config_class_for(config.peft_type.value) is method.config_class
    assert method.config_class(**config.to_dict()) == config
    assert all(field.name in config.to_dict() or field.name == "runtime_config" for field in dataclasses.fields(config))
    base = build("llama")
    plain = base(**batch("llama")).logits
    model = pf.get_peft_model(base, config).eval()
    randomise_adapters(model)
    trainable = sum(p.requires_grad for p in model.parameters())
    assert 0 < trainable == len(model.base_model.tensors("default"))
    changed = model(**batch("llama")).logits
    assert not torch.allclose(changed, plain)
    with model.disable_adapter():
        assert torch.equal(model(**batch("llama")).logits, plain)
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(again(**batch("llama")).logits, changed)
    assert torch.equal(model.unload()(**batch("llama")).logits, plain)


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="peft_type is 'VERA', expected one of .*LORA"):
        method_for("VERA")
