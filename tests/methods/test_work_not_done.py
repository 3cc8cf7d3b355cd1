"""What an adapted layer must not do: clone its output, widen activations, make an identity matrix or the dense weight."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyfastpeft as pf
from tests.methods.contract import scatter

TOKENS, WIDTH, RANK = 6, 64, 2


class Recorded(TorchDispatchMode):
    """(name of the op, dtypes and shapes of its tensor results) of everything inside."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        tensors = [
            t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)
        ]
        self.calls.append((op._schema.name, [(t.dtype, tuple(t.shape)) for t in tensors]))
        return result


def calls(quantize, train, **config):
    base = nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH)}).to(torch.bfloat16)
    if quantize:
        base = pf.quantize_model(base, skip=())
    model = scatter(pf.get_peft_model(base, pf.LoraConfig(target_modules=["layer"], r=RANK, **config)))
    layer = model.train(train).get_base_model()["layer"]
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=train)
    layer(x)  # what is needed once
    recorded = Recorded()
    with recorded:
        output = layer(x)
    assert output.dtype == torch.bfloat16 and output.requires_grad == train or not train
    return recorded.calls


def made_of_the_weights_size(made):
    views = ("aten::detach", "aten::t")
    return [name for name, tensors in made if name not in views and any(s == (WIDTH, WIDTH) for _, s in tensors)]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_lora(train, quantize):
    made = calls(quantize, train, lora_dropout=0.1)
    names = [name for name, _ in made]
    assert any(name.startswith("pyfastpeft::linear_") for name in names)
    assert not {"aten::clone", "aten::eye"} & set(names)
    activations = [t for _, tensors in made for t in tensors if t[1] == (TOKENS, WIDTH)]
    assert activations == [(torch.bfloat16, (TOKENS, WIDTH))]  # the output, and nothing else of its size
    assert not made_of_the_weights_size(made)


@pytest.mark.parametrize("quantize", [False, True])
def test_dora(quantize):
    """The norm comes from W's products with A and B, kept: after the first call W itself is not needed any more."""
    made = calls(quantize, False, use_dora=True)
    names = [name for name, _ in made]
    assert "aten::eye" not in names and not any("dequantize" in name for name in names)
    assert not made_of_the_weights_size(made)
