"""load_quantized_state_dict: into dense, meta and quantised models; whole or not at all."""

import pytest
import torch
from small_model import Model, kinds, make

import pyfastpeft as pf
from pyfastpeft.nn import NF4Linear

pytestmark = pytest.mark.filterwarnings("ignore:quantize_model. 1 3-D expert weights")


@pytest.mark.parametrize("target", ["dense", "meta", "quantized"])
def test_load_quantized_state_dict(target, tmp_path):
    from safetensors.torch import load_file, save_file

    model = pf.quantize_model(make(), blocksize=128)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    if target == "meta":
        with torch.device("meta"):
            other = Model()
    else:
        torch.manual_seed(1)
        other = Model() if target == "dense" else pf.quantize_model(Model())
    assert pf.load_quantized_state_dict(other, saved) is other
    assert kinds(other) == kinds(model)
    mine, theirs = other.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    x = torch.randn(2, 64)
    assert torch.equal(other.layers[0](x), model.layers[0](x))
    if target == "dense":
        assert other.layers[0].q_proj.weight.data_ptr() != saved["layers.0.q_proj.weight"].data_ptr()


def load_state(change):
    saved = dict(pf.quantize_model(make()).state_dict())
    change(saved)
    return saved


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        (lambda s: s.pop("lm_head.weight"), RuntimeError, "lm_head.weight"),
        (
            lambda s: s.pop("layers.0.q_proj.weight.absmax"),
            (RuntimeError, ValueError),
            r"layers\.0\.q_proj\.weight\.absmax",
        ),
        (lambda s: s.update(other=torch.zeros(1)), RuntimeError, "other"),
        (
            lambda s: s.update({k.replace("layers.0.q_proj", "nowhere"): v for k, v in s.items() if "0.q_proj" in k}),
            ValueError,
            "nowhere.weight has 4 bits, and the model has nothing there",
        ),
        (
            lambda s: s.update({k.replace("0.q_proj", "0.down_proj"): v for k, v in s.items() if "0.q_proj" in k}),
            ValueError,
            r"down_proj.weight has shape \(64, 64\), expected \(128, 64\)",
        ),
    ],
    ids=["missing", "missing statistics", "unexpected", "nowhere", "shape"],
)
def test_load_quantized_state_dict_refuses(change, exception, message, meta):
    with torch.device("meta" if meta else "cpu"):
        model = Model()
    with pytest.raises(exception, match=message):
        pf.load_quantized_state_dict(model, load_state(change))
    assert NF4Linear not in kinds(model).values()


def test_buffers_left_on_meta_are_named():
    with torch.device("meta"):
        model = Model()
        model.register_buffer("inv_freq", torch.ones(4), persistent=False)
    with pytest.raises(ValueError, match="inv_freq are still on the meta device"):
        pf.load_quantized_state_dict(model, pf.quantize_model(make()).state_dict())
