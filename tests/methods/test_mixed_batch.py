"""model(..., adapter_names=[...]) and generate(..., adapter_names=[...]): each sample answers as with its adapter alone."""

import copy

import peft
import pytest
import torch

import pyfastpeft as pf
from tests.methods.models import HIDDEN, TASK, batch, build

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "output.dense"],
    "t5": ["q", "v", "wo"],
}
ADAPTERS = {
    "small": {"r": 3, "lora_alpha": 6},
    "wide": {"r": 18, "lora_alpha": 9, "use_rslora": True},
    "part": {"r": 4, "layers": 1},  # fewer layers
}
NAMES = ["wide", "__base__", "small", "wide", "part"]


def _config(kind, library=pf, r=8, lora_alpha=8, layers=None, **more):
    targets = TARGETS[kind][:layers]
    return library.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets, task_type=TASK[kind], **more)


def _randomise(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def _model(kind, base=None, dtype=torch.float32, **more):
    base = build(kind, dtype=dtype) if base is None else base
    first, *others = ADAPTERS
    model = pf.get_peft_model(base, _config(kind, **ADAPTERS[first], **more), adapter_name=first)
    for name in others:
        model.add_adapter(name, _config(kind, **ADAPTERS[name], **more))
    _randomise(model)
    return model.eval()


def _inputs(kind, names=NAMES):
    return {k: v for k, v in batch(kind, rows=len(names)).items() if kind == "t5" or k != "labels"}


def _one_by_one(model, inputs, names):
    """The logits of every sample with its adapter alone."""
    rows = []
    for i, name in enumerate(names):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(**one).logits)
        else:
            model.set_adapter(name)
            rows.append(model(**one).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("quantised", [False, True])
@torch.no_grad()
def test_each_sample_has_its_own_adapter(kind, quantised):
    base = build(kind)
    if quantised:
        base = pf.quantize_model(base, skip=("classifier",) if kind == "bert" else ("lm_head",))
    model = _model(kind, base)
    inputs = _inputs(kind)
    expected = _one_by_one(model, inputs, NAMES)
    model.set_adapter("small")
    got = model(**inputs, adapter_names=NAMES).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert (got[0] - got[1]).abs().max() > 1e-2  # adapters that do something
    model.set_adapter("wide")
    torch.testing.assert_close(model(**inputs, adapter_names=NAMES).logits, got, msg="depends on the active adapter")


@torch.no_grad()
def test_one_product_of_the_base_and_one_call_of_the_kernel_a_layer():
    model, inputs = _model("llama"), _inputs("llama")
    model(**inputs, adapter_names=NAMES)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**inputs, adapter_names=NAMES)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["pyfastpeft::segmented_lora_"] == 6 and "pyfastpeft::linear_lora" not in counts
    base = build("llama")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        base(**inputs)
    assert counts["aten::linear"] == {event.key: event.count for event in profile.key_averages()}["aten::linear"]


@pytest.mark.parametrize("kind", ["llama", "bert"])
@torch.no_grad()
def test_bf16_stays_bf16(kind):
    model, inputs = _model(kind, dtype=torch.bfloat16), _inputs(kind)
    expected = _one_by_one(model, inputs, NAMES)
    got = model(**inputs, adapter_names=NAMES).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected.float()).norm() <= 0.05 * expected.float().norm()


@torch.no_grad()
def test_autocast():
    model, inputs = _model("llama"), _inputs("llama")
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**inputs, adapter_names=NAMES).logits
    expected = model(**inputs, adapter_names=NAMES).logits
    assert (got.float() - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@torch.no_grad()
def test_generate(kind, options):
    """With beams a sample's all have its adapter; an encoder sees samples, its decoder beams."""
    model, inputs = _model(kind), _inputs(kind)
    inputs.pop("labels", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    returned = options.get("num_return_sequences", 1)
    got = model.generate(**inputs, adapter_names=NAMES, **options)
    assert len(got) == len(NAMES) * returned
    for i, name in enumerate(NAMES):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**one, **options)
        else:
            model.set_adapter(name)
            alone = model.generate(**one, **options)
        assert torch.equal(got[i * returned : (i + 1) * returned], alone), name
    model.get_base_model().generation_config.num_beams = 2
    model.generate(**inputs, adapter_names=NAMES, max_new_tokens=2, pad_token_id=0)


@torch.no_grad()
def test_parity_with_peft(tmp_path):
    """PEFT with the files that ours wrote, on a model whose adapters have modules_to_save."""
    ours = _model("bert")
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "small", adapter_name="small")
    for name in ("wide", "part"):
        theirs.load_adapter(tmp_path / name, name)
    theirs.eval()
    inputs = _inputs("bert")
    got, expected = (model(**inputs, adapter_names=NAMES).logits for model in (ours, theirs))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_lora_bias():
    model, inputs = _model("bert", lora_bias=True), _inputs("bert")
    torch.testing.assert_close(
        model(**inputs, adapter_names=NAMES).logits, _one_by_one(model, inputs, NAMES), atol=2e-5, rtol=1e-4
    )


@torch.no_grad()
def test_other_methods_answer_by_their_samples():
    """DoRA beside LoRA, (IA)³, and AdaLoRA, whose factors the kernel takes."""
    model = pf.get_peft_model(build("llama"), _config("llama"), adapter_name="plain")
    model.add_adapter("dora", _config("llama", r=5, use_dora=True))
    _randomise(model.eval())
    names = ["dora", "plain", "__base__", "dora"]
    inputs = _inputs("llama", names)
    torch.testing.assert_close(
        model(**inputs, adapter_names=names).logits, _one_by_one(model, inputs, names), atol=2e-5, rtol=1e-4
    )
    scaled = pf.get_peft_model(
        build("llama"),
        pf.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        adapter_name="one",
    )
    scaled.add_adapter("two", pf.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in scaled.named_parameters():
        if "ia3_" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    scaled.eval()
    names = ["two", "one", "__base__"]
    inputs = _inputs("llama", names)
    torch.testing.assert_close(
        scaled(**inputs, adapter_names=names).logits, _one_by_one(scaled, inputs, names), atol=2e-5, rtol=1e-4
    )


@torch.no_grad()
def test_adalora():
    config = pf.AdaLoraConfig(
        init_r=4, target_r=2, target_modules=["q_proj", "v_proj"], total_step=10, task_type="CAUSAL_LM"
    )
    model = pf.get_peft_model(build("llama"), config)
    _randomise(model.eval())
    names = ["default", "__base__", "default"]
    inputs = _inputs("llama", names)
    torch.testing.assert_close(
        model(**inputs, adapter_names=names).logits, _one_by_one(model, inputs, names), atol=2e-5, rtol=1e-4
    )


def test_hooks_on_the_base_and_state_afterwards():
    model, inputs = _model("llama"), _inputs("llama")
    seen = []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    handle = layer.base_layer.register_forward_hook(lambda module, args, out: seen.append((out, out.clone())))
    with torch.no_grad():
        model(**inputs, adapter_names=NAMES)
    handle.remove()
    assert len(seen) == 1 and torch.equal(*seen[0])  # what a hook was given stays as it was
    assert layer.mixed is None
    with pytest.raises(ValueError, match="batch of 4"), torch.no_grad():
        model(**{key: value[:4] for key, value in inputs.items()}, adapter_names=NAMES)
    assert layer.mixed is None and copy.deepcopy(model) is not None


def test_disabled_adapters_stay_disabled():
    model, inputs = _model("llama"), _inputs("llama")
    with torch.no_grad(), model.disable_adapter():
        got, plain = model(**inputs, adapter_names=NAMES).logits, model(**inputs).logits
    assert torch.equal(got, plain)


def test_bad_input():
    model, inputs = _model("bert"), _inputs("bert")
    run = torch.no_grad()(lambda names, m=model: m(**inputs, adapter_names=names))
    with pytest.raises(ValueError, match="adapter_names has 4 names and a layer got a batch of 5; expected 4"):
        run(NAMES[:4])
    with pytest.raises(
        ValueError, match=r"there are no adapters \['tiny'\], expected some of \['part', 'small', 'wide'\]"
    ):
        run(["tiny", *NAMES[1:]])
    with pytest.raises(TypeError, match="adapter_names is 'small', expected a list"):
        run("small")
    with pytest.raises(TypeError, match="adapter_names holds 3, expected strings"):
        run([3] * 5)
    with pytest.raises(ValueError, match="adapter_names is empty"):
        run([])
    model.merge_adapter(["small"])
    with pytest.raises(ValueError, match=r"adapters \['small'\] are merged"):
        run(NAMES)
    model.unmerge_adapter()
    run(NAMES)
    saved = pf.get_peft_model(build("bert"), _config("bert", modules_to_save=["encoder.layer.1.attention"])).eval()
    with pytest.raises(
        ValueError, match="adapter 'default' has a copy of bert.encoder.layer.1.attention, a BertAttention"
    ):
        run(["default"] * 5, saved)
    for count in (1, 2):  # a part of the batch is no beam
        with pytest.raises(ValueError, match="a layer got a batch of 5"):
            run(["__base__"] * count)
    llama = pf.get_peft_model(build("llama"), pf.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="puts virtual tokens before every sample"):
        llama(torch.zeros(1, HIDDEN, dtype=torch.long), adapter_names=["default"])


class _Sees(torch.nn.Module):
    """An embedding, convolutions of every kind of input, a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(20, 6)
        self.line = torch.nn.Conv1d(6, 8, 3, padding=1)
        self.plane = torch.nn.Conv2d(1, 4, 3, stride=2)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, ids):
        x = self.line(self.table(ids).transpose(1, 2))
        return self.head(self.plane(x[:, None]).mean((2, 3)))


@pytest.mark.parametrize("quantised", [False, True])
def test_embeddings_and_convolutions_as_peft_answers(quantised):
    """Their samples' updates are PEFT's, rows of no adapter the base's, and gradients each adapter's own."""

    def made(library):
        names = ["first", "second"]
        base = _Sees()
        if quantised and library is pf:
            base = pf.quantize_model(base)
        model = None
        for i, name in enumerate(names):
            config = library.LoraConfig(r=2 + i, lora_alpha=3, target_modules=["table", "line", "plane", "head"])
            if model is None:
                model = library.get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        _randomise(model)
        return model.eval()

    ours, theirs = made(pf), made(peft)
    names = ["second", "__base__", "first", "second"]
    ids = torch.randint(0, 20, (4, 12), generator=torch.Generator().manual_seed(1))
    got = ours(ids, adapter_names=names)
    with torch.no_grad():
        if not quantised:
            torch.testing.assert_close(got, theirs(ids, adapter_names=names), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(got[1:2], _Sees()(ids[1:2]), atol=1e-5, rtol=1e-4)
        else:
            with ours.disable_adapter():
                torch.testing.assert_close(got[1:2], ours(ids[1:2]), atol=1e-5, rtol=1e-4)
            ours.set_adapter("first")
            torch.testing.assert_close(got[2:3], ours(ids[2:3]), atol=1e-5, rtol=1e-4)
    ours.set_requires_grad(["first", "second"])
    ours(ids, adapter_names=names).square().sum().backward()
    together = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    assert len(together) == 2 * 8
    for name in ("first", "second"):
        ours.zero_grad()
        ours.set_adapter(name)
        ours(ids[[i for i, other in enumerate(names) if other == name]]).square().sum().backward()
        for key, parameter in ours.named_parameters():
            if f".{name}" in key and key in together:
                torch.testing.assert_close(parameter.grad, together[key], atol=1e-5, rtol=1e-4, msg=key)


@torch.no_grad()
def test_wrong_names_and_lengths_in_generate():
    model, inputs = _model("llama"), _inputs("llama")
    with pytest.raises(ValueError, match=r"there are no adapters \['other'\]"):
        model.generate(**inputs, adapter_names=["other"] * 5, max_new_tokens=2)
    with pytest.raises(ValueError, match="adapter_names has 3 names and a layer got a batch of 10; expected 3 or 6"):
        model.generate(**inputs, adapter_names=NAMES[:3], max_new_tokens=2, num_beams=2, pad_token_id=0)
    assert all(holder.mixed is None for _, holder in model.base_model.holders())
