"""LoRA on nn.MultiheadAttention: what it computes, the encoder's fast path, files and parity with PEFT, errors."""

import copy
import warnings

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from pyfastpeft.methods.relora import merge_and_reinit
from tests.methods.contract import scatter

E = 8


class Cross(nn.Module):
    def __init__(self, batch_first=True, **more):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, 2, batch_first=batch_first, **more)

    def forward(self, query, key=None, **how):
        key = query if key is None else key
        return self.attn(query, key, key, **how)


def build(**more):
    torch.manual_seed(0)
    return Cross(**more).eval()


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, n, E, generator=generator).to(dtype) for n in (4, 5)]


def adapt(model, **options):
    return scatter(pf.get_peft_model(model, pf.LoraConfig(r=2, target_modules=["attn"], **options)), scale=0.3).eval()


def written_out(plain, adapted):
    """The module with its adapter's updates written into its weights."""
    layer, changed = adapted.base_model.model.attn, copy.deepcopy(plain)
    scaling = layer.scaling["default"]
    with torch.no_grad():
        changed.attn.in_proj_weight += scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        changed.attn.out_proj.weight += (
            scaling * layer.out_lora_B["default"].weight @ layer.out_lora_A["default"].weight
        )
    return changed


HOW = {
    "plain": {},
    "no weights": {"need_weights": False},
    "every head's": {"average_attn_weights": False},
    "masks": {
        "attn_mask": torch.triu(torch.ones(4, 4, dtype=torch.bool), 1),
        "key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True], [False] * 3 + [True]]),
    },
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_merge_and_undoing(how, grad):
    plain = build().double()
    model = adapt(copy.deepcopy(plain), init_lora_weights=False)
    x = inputs(torch.float64)[0]
    expected = written_out(plain, model)(x, **how)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x, **how), expected, rtol=1e-10, atol=1e-10)
    before = model.base_model.model.attn.base_layer.in_proj_weight.detach().clone()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x, **how), expected, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.attn.base_layer.in_proj_weight, before)
    with model.disable_adapter():
        torch.testing.assert_close(model(x, **how), plain(x, **how), rtol=1e-10, atol=1e-12)
    merged = model.merge_and_unload()
    assert type(merged.attn) is nn.MultiheadAttention
    torch.testing.assert_close(merged(x, **how), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("more", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_cross_attention_and_gradients(batch_first, more):
    plain = build(batch_first=batch_first, **more).double()
    model = adapt(copy.deepcopy(plain))
    query, key = inputs(torch.float64)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    torch.testing.assert_close(model(query, key)[0], written_out(plain, model)(query, key)[0])
    model(query, key)[0].square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    for parameter in trained:
        value, step, ends = parameter[1, 1].item(), 1e-6, []
        with torch.no_grad():
            for sign in (1, -1):
                parameter[1, 1] = value + sign * step
                ends.append(model(query, key)[0].square().sum().item())
            parameter[1, 1] = value
        assert parameter.grad[1, 1].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("whole", [True, False], ids=["encoder", "layer"])
def test_the_encoders_fast_path_does_not_pass_the_adapter_by(whole):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True)
    plain = (nn.TransformerEncoder(layer, 2) if whole else layer).eval()
    model = pf.get_peft_model(copy.deepcopy(plain), pf.LoraConfig(r=2, target_modules=["self_attn"]))
    x = inputs()[0]
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False] * 3 + [True]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain(x))
        scatter(model)
        for mask in (None, padding):
            fast = model(x, src_key_padding_mask=mask)
            with torch.enable_grad():
                slow = model(x, src_key_padding_mask=mask)
            kept = torch.ones(3, 4, dtype=torch.bool) if mask is None else ~mask
            torch.testing.assert_close(fast[kept], slow[kept])
            assert not torch.allclose(fast[kept], plain(x, src_key_padding_mask=mask)[kept], atol=1e-2)
        merged = model.merge_and_unload()  # on the fast path again
        torch.testing.assert_close(merged(x), fast if mask is None else model(x))


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": False}, {"use_rslora": True, "lora_alpha": 3}])
def test_equal_to_peft(options, tmp_path):
    peft = pytest.importorskip("peft")
    query, key = inputs()
    files, outputs, initial, gradients, merged = [], [], [], [], []
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in (peft, pf):
            model = build()
            torch.manual_seed(5)
            model = library.get_peft_model(model, library.LoraConfig(r=2, target_modules=["attn"], **options))
            folder = tmp_path / library.__name__
            model.save_pretrained(folder)
            initial.append(load_file(folder / "adapter_model.safetensors"))
            generator = torch.Generator().manual_seed(2)
            trained = {
                n.replace("out_lora", "base_layer.out_proj.lora"): p
                for n, p in model.named_parameters()
                if p.requires_grad
            }
            with torch.no_grad():
                for name, parameter in sorted(trained.items()):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
                    if "out_proj.lora_B" in name:  # see the next test
                        parameter.zero_()
            y = model.eval()(query, key)[0]
            y.square().sum().backward()
            outputs.append(y), gradients.append({n: p.grad for n, p in trained.items()})
            model.save_pretrained(folder)
            files.append(load_file(folder / "adapter_model.safetensors"))
            merged.append(model.merge_and_unload()(query, key)[0])
        assert set(gradients[0]) == set(gradients[1])
        for both in (initial, files, gradients):
            for name, expected in both[0].items():
                torch.testing.assert_close(both[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)
        assert set(files[0]) == set(files[1])
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(merged[1], merged[0])
        for library, folder in ((peft, "pyfastpeft"), (pf, "peft"), (pf, "pyfastpeft")):
            loaded = library.PeftModel.from_pretrained(build(), tmp_path / folder).eval()
            torch.testing.assert_close(loaded(query, key)[0], outputs[0])


def test_the_outputs_update_counts_once():
    """PEFT 0.21.2 adds the output projection's update twice, in forward and merge (its gradient once)."""
    peft = pytest.importorskip("peft")
    plain = build()
    model = adapt(copy.deepcopy(plain), init_lora_weights=False)
    query, key = inputs()
    layer = model.base_model.model.attn
    expected = model(query, key)[0]
    torch.testing.assert_close(expected, written_out(plain, model)(query, key)[0])
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["attn"])).eval()
    other = theirs.base_model.model.attn
    factors = ((other.lora_A, layer.lora_A, 1), (other.lora_B, layer.lora_B, 1))
    out = other.base_layer.out_proj
    factors += ((out.lora_A, layer.out_lora_A, 1), (out.lora_B, layer.out_lora_B, 0.5))
    with torch.no_grad():
        for target, source, factor in factors:
            target["default"].weight.copy_(source["default"].weight * factor)
    torch.testing.assert_close(theirs(query, key)[0], expected)


def test_bf16_several_adapters_and_state():
    plain = build().bfloat16()
    query, key = inputs(torch.bfloat16)
    expected = plain(query, key)[0]
    model = pf.get_peft_model(copy.deepcopy(plain), pf.LoraConfig(r=2, target_modules=["attn"])).eval()
    assert torch.equal(model(query, key)[0], expected) and model(query, key)[0].dtype == torch.bfloat16
    model.add_adapter("b", pf.LoraConfig(r=3, target_modules=["attn"], init_lora_weights=False))
    model.set_adapter("b")
    second = model(query, key)[0]
    assert not torch.equal(second, expected)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert torch.equal(copy.deepcopy(model)(query, key)[0], second)
    with pytest.raises(ValueError, match="cannot share a batch"):
        model(query, key, adapter_names=["b", "default", "__base__"])
    with pytest.raises(ValueError, match="whose adapters cannot be combined"):
        model.base_model.add_weighted_adapter(["default", "b"], [1, 1], "c", "cat")
    with pytest.raises(ValueError, match="attn is a LoraAttention"):
        merge_and_reinit(model)
    model.delete_adapter("b")
    assert torch.equal(model(query, key)[0], expected)
    assert type(model.unload().attn) is nn.MultiheadAttention


BAD = {
    "kdim": ({"kdim": 4}, {}, "kdim or vdim of its own"),
    "dora": ({}, {"use_dora": True}, "no use_dora=True"),
    "lora_bias": ({}, {"lora_bias": True}, "no lora_bias=True"),
    "bias": ({}, {"bias": "all"}, "no bias='all'"),
    "pissa": ({}, {"init_lora_weights": "pissa"}, "no init_lora_weights='pissa'"),
    "out_proj": ({}, {"target_modules": ["out_proj"]}, r"attn.out_proj \(NonDynamicallyQuantizableLinear\)"),
}


@pytest.mark.parametrize(("more", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_leaves_the_model_as_it_was(more, options, message):
    model = build(**more)
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pf.get_peft_model(model, pf.LoraConfig(**({"target_modules": ["attn"], "r": 2} | options)))
    assert set(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


def test_nan_is_not_merged_and_dropout_is_said_not_to_act():
    with pytest.warns(UserWarning, match="attn is a MultiheadAttention, where lora_dropout does not act"):
        model = adapt(build(), lora_dropout=0.1)
    with torch.no_grad():
        model.base_model.model.attn.out_lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinities in base_layer.out_proj.lora_A"):
        model.merge_and_unload()
