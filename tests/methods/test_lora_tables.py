"""LoRA on embeddings and convolutions: what it computes, merges, refuses, and what it does where PEFT is wrong."""

import copy
import warnings

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from tests.methods.contract import scatter
from tests.methods.models import batch, build

CONVOLUTIONS = {
    "1d": lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1, dilation=2),
    "2d": lambda: nn.Conv2d(3, 5, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1), bias=False),
    "3d": lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=1, stride=(1, 2, 1)),
    "same": lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2),
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular", dilation=2),
    "channels last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "point": lambda: nn.Conv2d(3, 4, 1),
    "transposed 1d": lambda: nn.ConvTranspose1d(3, 5, 3, stride=2, padding=1, output_padding=1),
    "transposed 2d": lambda: nn.ConvTranspose2d(
        3, 5, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1), bias=False
    ),
    "transposed 3d": lambda: nn.ConvTranspose3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
    "transposed groups": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    "transposed depthwise": lambda: nn.ConvTranspose1d(2, 2, 4, groups=2),
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(shares its weight|weight of its own)")
        yield


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def image(layer, dtype=torch.float32):
    sizes = (9, 8, 7)[: layer.weight.dim() - 2]
    return torch.randn(2, layer.in_channels, *sizes, generator=torch.Generator().manual_seed(3)).to(dtype)


def adapt(layer, **options):
    return scatter(pf.get_peft_model(One(layer), pf.LoraConfig(r=2, target_modules=["layer"], **options)), scale=0.5)


def direct(layer, adapted, x):
    """The update written out: the base with the weight W + s B A."""
    changed, scaling = copy.deepcopy(layer), adapted.scaling["default"]
    if type(layer).__name__.startswith("ConvTranspose"):
        a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
        ranks, inputs = (n // layer.groups for n in (len(a), layer.in_channels))
        for i in range(layer.in_channels):
            group, inner = divmod(i, inputs)
            for r in range(group * ranks, (group + 1) * ranks):
                changed.weight.data[i] += scaling * a[r, inner].item() * b[r].data
        return changed(x)
    a, b, _ = adapted.factors("default")
    changed.weight.data = layer.weight.data + scaling * (b @ a).view_as(layer.weight)
    return changed(x)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_convolution_and_its_merge(kind, dora):
    """Forward against the written-out weight in fp64, gradients against finite differences, merge and its undoing."""
    torch.manual_seed(0)
    layer = CONVOLUTIONS[kind]().double()
    plain, x = copy.deepcopy(layer), image(layer, torch.float64)
    model = adapt(layer, use_dora=dora)
    inner = model.base_model.model.layer
    y = model(x)
    if not dora:
        torch.testing.assert_close(y, direct(plain, inner, x), rtol=1e-10, atol=1e-10)
    before = layer.weight.detach().clone()
    model.merge_adapter(safe_merge=True)
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    y.square().sum().backward()
    if not dora:  # whose norm has no gradient
        for parameter in trained.values():
            index = tuple(size // 2 for size in parameter.shape)
            with torch.no_grad():
                value, step = parameter[index].item(), 1e-6
                ends = []
                for sign in (1, -1):
                    parameter[index] = value + sign * step
                    ends.append(model(x).square().sum().item())
                parameter[index] = value
            assert parameter.grad[index].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-6)
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(plain) and merged.layer.weight.shape == plain.weight.shape
    torch.testing.assert_close(merged(x), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["1d", "2d", "channels last", "transposed 1d", "transposed groups"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_new_adapters_change_nothing_in_bf16(kind, dora):
    layer = CONVOLUTIONS[kind]().bfloat16()
    x = image(layer, torch.bfloat16)
    plain = layer(x)
    model = pf.get_peft_model(One(layer), pf.LoraConfig(r=2, target_modules=["layer"], use_dora=dora))
    assert torch.equal(model(x), plain) and model(x).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["1d", "2d", "3d", "reflect"])
@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_ia3_convolution(kind, feedforward, groups):
    torch.manual_seed(0)
    layer = CONVOLUTIONS[kind]()
    layer = type(layer)(
        4, 6, layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups, padding_mode=layer.padding_mode
    ).double()
    x = image(layer, torch.float64)
    config = pf.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if feedforward else [])
    plain = copy.deepcopy(layer)
    model = scatter(pf.get_peft_model(One(layer), config), scale=0.5)
    scale = model.base_model.model.layer.ia3_l["default"]
    y = model(x)
    scale = scale.view(-1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(y, plain(x * scale) if feedforward else plain(x) * scale, rtol=1e-10, atol=1e-10)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.bias, plain.bias)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-10, atol=1e-10)


def test_several_adapters_dropout_and_combination():
    torch.manual_seed(0)
    layer = CONVOLUTIONS["2d"]()
    x = image(layer)
    plain = layer(x)
    model = adapt(layer, lora_dropout=0.5)
    model.add_adapter("b", pf.LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False, lora_alpha=5))
    first = model.eval()(x)
    model.set_adapter("b")
    second = model(x)
    model.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(model(x), first + second - plain)
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), first + second - plain, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    assert not torch.equal(model.train()(x), model(x))
    mixed = model.eval()(x, adapter_names=["b", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([second[0], plain[1]]))
    model.delete_adapter("b"), model.delete_adapter("sum")
    torch.testing.assert_close(model(x), first)
    assert torch.equal(model.unload()(x), plain)


class Shifted(nn.Embedding):
    """As BART's learned positions: looks up later rows."""

    def forward(self, ids, offset=0):
        return super().forward(ids + 2 + offset) * 3.0


@pytest.mark.parametrize("cls", [nn.Embedding, Shifted])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_embedding_and_its_merge(cls, dora):
    torch.manual_seed(0)
    table = cls(12, 5, padding_idx=1).double()
    ids = torch.tensor([[0, 1, 7], [9, 3, 3]])
    plain = table(ids)
    model = pf.get_peft_model(One(table), pf.LoraConfig(r=2, target_modules=["layer"], use_dora=dora))
    assert torch.equal(model(ids), plain)
    y = scatter(model, scale=0.5)(ids)
    y.sum().backward()
    inner = model.base_model.model.layer
    assert inner.num_embeddings == 12 and inner.embedding_dim == 5 and inner.padding_idx == 1
    seen = ids + 2 if cls is Shifted else ids[ids != 1]  # a padding row has no gradient
    used = inner.lora_embedding_A["default"].grad.abs().sum(0) > 0
    expected = torch.zeros(12, dtype=torch.bool)
    expected[seen.flatten()] = True
    assert torch.equal(used, expected)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(ids), y, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(ids), plain)
    torch.testing.assert_close(model.merge_and_unload()(ids), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_merging_a_tied_embedding_leaves_the_head_alone(base):
    """PEFT writes into the shared weight, and the merged model's head is then another."""
    model = build("gpt2", dtype=torch.bfloat16)
    if base == "nf4":
        model = pf.quantize_model(model)
    with pytest.warns(UserWarning, match="wte is adapted and shares its weight with lm_head"):
        model = pf.get_peft_model(model, pf.LoraConfig(r=2, target_modules=["wte"], task_type="CAUSAL_LM"))
    scatter(model.eval())
    with torch.no_grad():
        y = model(**batch("gpt2")).logits
    with pytest.warns(UserWarning, match="wte has now a weight of its own, apart from lm_head"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings and y.dtype == torch.bfloat16
    assert merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight
    torch.testing.assert_close(merged(**batch("gpt2")).logits, y, rtol=2e-2, atol=2e-2)


def test_generation_and_checkpointing():
    model = pf.get_peft_model(
        build("llama"), pf.LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"], task_type="CAUSAL_LM")
    )
    scatter(model)
    ids = batch("llama")["input_ids"]
    out = model.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    logits = model(input_ids=out[:, :-1]).logits
    assert torch.equal(logits.argmax(-1)[:, -4:], out[:, -4:])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()(**batch("llama")).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


class OddConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2)


BAD = {
    "max_norm": (lambda: nn.Embedding(5, 4, max_norm=1.0), {}, "layer is an embedding with max_norm=1.0"),
    "sparse": (lambda: nn.Embedding(5, 4, sparse=True), {}, "layer is an embedding with sparse=True"),
    "bias": (lambda: nn.Embedding(5, 4), {"lora_bias": True}, "no place for lora_bias"),
    "rank": (lambda: nn.Conv1d(6, 6, 3, groups=3), {}, r"groups=3, which must divide the rank, 2"),
    "dora": (lambda: nn.Conv1d(4, 4, 3, groups=2), {"use_dora": True}, "groups=2 cannot have DoRA"),
    "pissa": (lambda: nn.Conv1d(4, 4, 3), {"init_lora_weights": "pissa"}, "is for linear layers"),
    "forward": (lambda: OddConv(4, 4, 3), {}, "OddConv with a forward of its own"),
    "transposed rank": (lambda: nn.ConvTranspose1d(6, 6, 3, groups=3), {}, r"groups=3, which must divide the rank, 2"),
    "transposed pissa": (lambda: nn.ConvTranspose2d(4, 4, 3), {"init_lora_weights": "olora"}, "is for linear layers"),
    "pooling": (lambda: nn.MaxPool2d(3), {}, r"layer \(MaxPool2d\)"),
}


@pytest.mark.parametrize(("make", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_leaves_the_model_as_it_was(make, options, message):
    model = One(make())
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pf.get_peft_model(model, pf.LoraConfig(r=2, target_modules=["layer"], **options))
    assert set(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


def test_a_transposed_convolutions_output_size_file_and_bias(tmp_path):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)
    plain, x = copy.deepcopy(layer), image(layer)
    model = adapt(layer, lora_bias=True, lora_dropout=0.3).eval()
    with torch.no_grad():
        y = model.base_model.model.layer(x, output_size=[18, 16])
        assert y.shape[2:] == (18, 16)
        changed = copy.deepcopy(plain)
        inner = model.base_model.model.layer
        changed.bias += inner.scaling["default"] * inner.lora_B["default"].bias
        expected = direct(changed, inner, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(One(copy.deepcopy(plain)), tmp_path)
    assert torch.equal(again(x), model(x))
    mixed = model(x, adapter_names=["__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([plain(x)[0], expected[1]]), rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.train()(x), model(x))
    torch.testing.assert_close(model.eval().merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


def test_combining_transposed_convolutions():
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d(3, 5, 3, stride=2)
    x = image(layer)
    plain, model = layer(x), adapt(layer)
    model.add_adapter("b", pf.LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False, lora_alpha=5))
    first = model.eval()(x)
    model.set_adapter("b")
    second = model(x)
    for kind in ("cat", "svd"):
        model.base_model.add_weighted_adapter(["default", "b"], [1.0, -2.0], kind, kind, svd_rank=5)
        model.set_adapter(kind)
        torch.testing.assert_close(model(x), first - 2 * second + 2 * plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_grouped_convolutions_as_peft(groups, kind, tmp_path):
    """The same draws, forward, gradients and files, both ways; neither merges groups."""
    import peft
    from safetensors.torch import load_file

    def made(library, seed, **options):
        torch.manual_seed(0)
        layer = kind(4, 8, 3, padding=1, groups=groups)
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return library.get_peft_model(One(layer), library.LoraConfig(r=4, target_modules=["layer"], **options))

    models = [made(library, 5, init_lora_weights=False) for library in (pf, peft)]
    x = image(models[0].base_model.model.layer.base_layer)
    gradients = []
    for model, name in zip(models, ("ours", "theirs"), strict=True):
        model(x).square().sum().backward()
        gradients.append([p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad])
        model.save_pretrained(tmp_path / name)
    torch.testing.assert_close(models[0](x), models[1](x))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], v) for k, v in files[1].items())
    read = pf.PeftModel.from_pretrained(One(copy.deepcopy(models[0].unload().layer)), tmp_path / "theirs")
    torch.testing.assert_close(read(x), models[1](x))


def test_groups_are_not_merged():
    model = adapt(nn.Conv2d(4, 4, 3, groups=2))
    before = model.base_model.model.layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="layer: LoRA on a convolution with groups=2 cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(model.base_model.model.layer.base_layer.weight, before)


def test_nan_is_not_merged():
    model = adapt(nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model.base_model.model.layer.lora_A["default"].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinities in lora_A"):
        model.merge_adapter()
