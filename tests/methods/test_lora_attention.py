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

    def forward(self, query, key=None, value=None, **how):
        key = query if key is None else key
        return self.attn(query, key, key if value is None else value, **how)


def build(**more):
    torch.manual_seed(0)
    return Cross(**more).eval()


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, n, E, generator=generator).to(dtype) for n in (4, 5)]


def adapt(model, **options):
    return scatter(pf.get_peft_model(model, pf.LoraConfig(r=2, target_modules=["attn"], **options)), scale=0.3).eval()


def written_out(plain, adapted, name="default"):
    """The module with its adapter's updates written into its weights and biases."""
    layer, changed = adapted.base_model.model.attn, copy.deepcopy(plain)
    scaling, parameters = layer.scaling[name], dict(changed.attn.named_parameters())
    separate = {"q_proj_weight": "", "k_proj_weight": "k_", "v_proj_weight": "v_", "out_proj.weight": "out_"}
    packed = {"in_proj_weight": "", "out_proj.weight": "out_"}
    bias, at = [], packed if changed.attn._qkv_same_embed_dim else separate
    with torch.no_grad():
        for key, prefix in at.items():
            a, b = (getattr(layer, f"{prefix}lora_{part}")[name] for part in "AB")
            weight = parameters[key]
            weight += scaling * b.weight @ a.weight
            if name in layer.lora_magnitude_vector:
                magnitude = getattr(layer, f"{prefix}lora_magnitude_vector")[name].weight
                weight *= (magnitude / weight.norm(dim=1))[:, None]
            if b.bias is not None:
                bias.append(scaling * b.bias)
        if bias:
            changed.attn.out_proj.bias += bias.pop()
            changed.attn.in_proj_bias += torch.cat(bias)
    return changed


HOW = {
    "plain": {},
    "no weights": {"need_weights": False},
    "every head's": {"average_attn_weights": False},
    "masks": {
        "attn_mask": torch.triu(torch.ones(4, 4, dtype=torch.bool), 1),
        "key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True], [False] * 3 + [True]]),
    },
    "causal": {
        "attn_mask": torch.triu(torch.ones(4, 4, dtype=torch.bool), 1),
        "is_causal": True,
        "need_weights": False,
    },
    "heads' masks": {"attn_mask": torch.linspace(-1, 1, 6 * 16).view(6, 4, 4).double()},
}
VARIANTS = {
    "plain": {"init_lora_weights": False},
    "dora": {"init_lora_weights": False, "use_dora": True},
    "bias": {"init_lora_weights": False, "lora_bias": True},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_merge_and_undoing(how, grad, variant):
    plain = build().double()
    model = adapt(copy.deepcopy(plain), **VARIANTS[variant])
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


SIZES = {"both": {"kdim": 5, "vdim": 3}, "key": {"kdim": 5}, "value": {"vdim": 3}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_projections_that_are_not_packed(sizes, variant, tmp_path):
    """kdim, vdim: each projection has its own A and B; identity, forward, gradients, merge, files."""
    more = {**sizes, "add_bias_kv": "kdim" in sizes}
    plain = build(**more).double()
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(3, 4, E, generator=generator).double()
    key, value = (torch.randn(3, 6, sizes.get(n, E), generator=generator).double() for n in ("kdim", "vdim"))
    options = VARIANTS[variant] | {"init_lora_weights": True}
    new = pf.get_peft_model(copy.deepcopy(plain), pf.LoraConfig(r=2, target_modules=["attn"], **options)).eval()
    torch.testing.assert_close(new(query, key, value), plain(query, key, value), rtol=1e-12, atol=1e-12)
    model = adapt(copy.deepcopy(plain), **VARIANTS[variant])
    expected = written_out(plain, model)(query, key, value)
    torch.testing.assert_close(model(query, key, value), expected, rtol=1e-10, atol=1e-10)
    model(query, key, value)[0].square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == {"plain": 8, "dora": 12, "bias": 12}[variant] and all(p.grad.norm() > 0 for p in trained)
    if variant != "dora":  # whose norm has no gradient
        for parameter in trained:
            place, step, ends = tuple(size // 2 for size in parameter.shape), 1e-6, []
            former = parameter[place].item()
            with torch.no_grad():
                for sign in (1, -1):
                    parameter[place] = former + sign * step
                    ends.append(model(query, key, value)[0].square().sum().item())
                parameter[place] = former
            assert parameter.grad[place].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8)
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(copy.deepcopy(plain).float(), tmp_path)
    torch.testing.assert_close(again(query.float(), key.float(), value.float())[0], expected[0].float())
    keys = {key for key in again.base_model.tensors("default")}
    assert "base_model.model.attn.base_layer.k_proj.lora_A.weight" in keys
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(query, key, value), expected, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in copy.deepcopy(model).unload().named_parameters())
    torch.testing.assert_close(model.merge_and_unload()(query, key, value), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("how", [k for k in HOW])
def test_mixed_batches(first, how):
    how, plain = HOW[how], build(batch_first=first).double()
    model = adapt(copy.deepcopy(plain), init_lora_weights=False)
    options = {"r": 3, "target_modules": ["attn"], "init_lora_weights": False}
    model.add_adapter("b", pf.LoraConfig(use_dora=True, **options))
    x = inputs(torch.float64)[0]
    x = x if first else x.transpose(0, 1).contiguous()
    expected = []
    for name in ("b", "__base__", "default"):
        one = plain if name == "__base__" else written_out(plain, model, name)
        expected.append(one(x, **how))
    got = model(x, **how, adapter_names=["b", "__base__", "default"])
    for sample, (y, weights) in enumerate(expected):
        torch.testing.assert_close(
            got[0].select(1 - first, sample), y.select(1 - first, sample), rtol=1e-10, atol=1e-10
        )
        if weights is None:
            assert got[1] is None
        else:
            torch.testing.assert_close(got[1][sample], weights[sample], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x, **how)[0], expected[2][0], rtol=1e-10, atol=1e-10)  # as before
    with pytest.raises(ValueError, match="a query of 2 dimensions, expected 3"):
        model(x[0], adapter_names=["b", "b", "b"])


def test_mixed_batches_of_an_encoder():
    """Off the fast path, also where the active adapter has nothing in the attention."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 16, batch_first=True), 2).eval()
    plain, x = copy.deepcopy(encoder), inputs()[0]
    model = scatter(pf.get_peft_model(encoder, pf.LoraConfig(r=2, target_modules=["self_attn"])), scale=0.3).eval()
    model.add_adapter("none of it", pf.LoraConfig(r=2, target_modules=["layers.0.linear1"]))
    with torch.no_grad():
        both = plain(x), model(x)
        for active in ("default", "none of it"):
            model.set_adapter(active)
            got = model(x, adapter_names=["default", "__base__", "default"])
            for sample, source in enumerate((1, 0, 1)):
                torch.testing.assert_close(got[sample], both[source][sample])


def test_the_encoders_fast_path_and_its_other_layers():
    """Without an adapter in self_attn torch's encoder layer passes by those of linear1 and linear2: that is said."""
    torch.manual_seed(0)
    plain, x = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True).eval(), inputs()[0]
    with pytest.warns(UserWarning, match="reads the weight of linear1 past the adapter; call torch.backends.mha"):
        model = pf.get_peft_model(copy.deepcopy(plain), pf.LoraConfig(r=2, target_modules=["linear1"]))
    scatter(model.eval(), scale=0.3)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.testing.assert_close(model(x), merged(x))
        assert not torch.allclose(model(x), plain(x), atol=1e-3)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_dora_in_bf16_and_of_several_adapters():
    plain = build().bfloat16()
    query, key = inputs(torch.bfloat16)
    expected = plain(query, key)[0]
    model = pf.get_peft_model(copy.deepcopy(plain), pf.LoraConfig(r=2, target_modules=["attn"], use_dora=True)).eval()
    assert torch.equal(model(query, key)[0], expected)
    plain = build().double()
    model = adapt(copy.deepcopy(plain), use_dora=True)
    model.add_adapter("b", pf.LoraConfig(r=3, target_modules=["attn"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    parts = [written_out(plain, model, name).attn.in_proj_weight for name in ("default", "b")]
    merged = copy.deepcopy(model).merge_and_unload().attn.in_proj_weight
    torch.testing.assert_close(merged, parts[0] + parts[1] - plain.attn.in_proj_weight)
    query, key = inputs(torch.float64)
    torch.testing.assert_close(model(query, key)[0], model.merge_and_unload()(query, key)[0])


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
    model.base_model.add_weighted_adapter(["default", "b"], [0.5, -2.0], "c", "cat")
    layer = model.base_model.model.attn
    for one, other, made in zip(*(layer.products(name) for name in ("default", "b", "c")), strict=True):
        one, other, made = (s * b @ a for a, b, s in (one, other, made))
        torch.testing.assert_close(made, 0.5 * one - 2 * other, rtol=1e-4, atol=1e-5)
    model.delete_adapter("c")
    with pytest.raises(ValueError, match="attn is a LoraAttention"):
        merge_and_reinit(model)
    model.delete_adapter("b")
    assert torch.equal(model(query, key)[0], expected)
    assert type(model.unload().attn) is nn.MultiheadAttention


BAD = {
    "lora_bias": ({"bias": False}, {"lora_bias": True}, "without biases .bias=False., in which lora_bias has nothing"),
    "bias": ({}, {"bias": "all"}, "not among those that bias='all' trains"),
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
