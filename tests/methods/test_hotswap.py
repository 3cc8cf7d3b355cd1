"""hotswap_adapter: the values of one file in the place of another's, and no new graph of a compiled model."""

import json

import peft
import pytest
import torch
from peft.utils import hotswap as peft_hotswap
from safetensors.torch import load_file, save_file

import pyfastpeft as pf
from tests.methods.models import build
from tests.methods.test_mixed_batch import _inputs, _randomise

TARGETS = ["q_proj", "v_proj", "down_proj"]
NAMES = ["default"] * 3


def _saved(folder, seed=0, kind="llama", **options):
    """A folder with an adapter of random values."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    model = pf.get_peft_model(build(kind), pf.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + 0.1)
    model.save_pretrained(folder)
    return folder


def _load(folder, kind="llama", quantised=False, **options):
    base = build(kind)
    return pf.PeftModel.from_pretrained(pf.quantize_model(base) if quantised else base, folder, **options)


@pytest.fixture
def folders(tmp_path):
    """A first adapter, and others: of another rank and scaling, of fewer layers, with ranks of their own."""
    return [
        _saved(tmp_path / "first"),
        _saved(tmp_path / "wide", 1, r=7, lora_alpha=3, use_rslora=True, lora_dropout=0.1),
        _saved(tmp_path / "part", 2, r=2, target_modules=["v_proj"]),
        _saved(tmp_path / "patterns", 3, rank_pattern={"v_proj": 8}, alpha_pattern={"q_proj": 1}),
    ]


@pytest.mark.parametrize("quantised", [False, True])
@torch.no_grad()
def test_no_new_graph(folders, quantised, tmp_path):
    inputs = _inputs("llama", NAMES)
    model = _load(folders[0], quantised=quantised)
    before = model(**inputs).logits
    pf.prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(**inputs).logits, before, msg="padding changed the model", atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(**inputs)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for folder in (*folders[1:], folders[0]):
            pf.hotswap_adapter(compiled, folder, adapter_name="default")
            expected = _load(folder, quantised=quantised)(**inputs).logits
            torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=1e-4, msg=str(folder))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    pf.hotswap_adapter(compiled, folders[1], adapter_name="default")
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", folders[1]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    torch.testing.assert_close(_load(tmp_path / "again")(**inputs).logits, _load(folders[1])(**inputs).logits)


def test_without_preparation(folders):
    """Eager: ranks grow and shrink as they come; a swap of a compiled model of equal ranks needs no new graph."""
    inputs = _inputs("llama", NAMES)
    model = _load(folders[0])
    for folder in (*folders[1:], folders[0]):
        pf.hotswap_adapter(model, folder, "default")
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, _load(folder)(**inputs).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_parity_with_peft(folders):
    inputs = _inputs("llama", NAMES)
    ours = _load(folders[0])
    theirs = peft.PeftModel.from_pretrained(build("llama"), folders[0]).eval()
    pf.prepare_model_for_compiled_hotswap(ours, target_rank=8)
    peft_hotswap.prepare_model_for_compiled_hotswap(theirs, target_rank=8)
    pf.hotswap_adapter(ours, folders[2], "default")
    peft_hotswap.hotswap_adapter(theirs, str(folders[2]), "default", torch_device="cpu")
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_mixed_batch_of_prepared_adapters(folders):
    inputs = _inputs("llama", ["one", "__base__", "two"])
    model = _load(folders[0], adapter_name="one")
    model.load_adapter(folders[1], "two")
    expected = model(**inputs, adapter_names=["one", "__base__", "two"]).logits
    pf.prepare_model_for_compiled_hotswap(model, target_rank=8)
    got = model(**inputs, adapter_names=["one", "__base__", "two"]).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_merging_dora_and_training_after_a_swap(tmp_path):
    inputs = _inputs("llama", NAMES)
    first, second = (_saved(tmp_path / str(i), i, r=3 + i, use_dora=True) for i in range(2))
    model = _load(first, is_trainable=True)
    pf.prepare_model_for_compiled_hotswap(model, target_rank=5)
    pf.hotswap_adapter(model, second, "default")
    expected = _load(second)(**inputs).logits
    torch.testing.assert_close(model.eval()(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_configs_keep_the_scaling(folders, tmp_path):
    """config=model.peft_config: the files then have the padded ranks, and alphas to match."""
    inputs = _inputs("llama", NAMES)
    for folder in folders[1:]:
        model = _load(folder)
        expected = model(**inputs).logits
        pf.prepare_model_for_compiled_hotswap(model, target_rank=9, config=model.peft_config)
        assert model.peft_config["default"].r == 9
        model.save_pretrained(tmp_path / "padded")
        torch.testing.assert_close(_load(tmp_path / "padded")(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


def test_scalings_follow_the_model(folders):
    model = _load(folders[0])
    pf.prepare_model_for_compiled_hotswap(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer.scaling["default"], torch.Tensor) and len(layer.lora_A["default"].weight) == 4
    assert model.to("meta") is model and layer.scaling["default"].is_meta


def test_preparing_bad_input(folders):
    model = _load(folders[1])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    prepare = pf.prepare_model_for_compiled_hotswap
    with pytest.raises(ValueError, match="adapter 'default' has rank 7, more than target_rank 4"):
        prepare(model, target_rank=4)
    with pytest.raises(ValueError, match="target_rank is 0"):
        prepare(model, target_rank=0)
    with pytest.raises(ValueError, match="check_compiled is 'no'"):
        prepare(model, check_compiled="no")
    with pytest.raises(ValueError, match="no LoRA adapter"):
        prepare(build("llama"), target_rank=8)
    with pytest.raises(ValueError, match="compiled already, and would be compiled again; call it before"):
        prepare(torch.compile(model, backend="eager"), target_rank=8)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer.scaling["default"], float)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare(torch.compile(model, backend="eager"), target_rank=8, check_compiled="warn")


def _edit(folder, change=None, config=None):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if change is not None:
        change(tensors)
    save_file(tensors, file)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | (config or {})))
    return folder


def test_bad_input_leaves_the_model_as_it_was(folders, tmp_path):
    model = _load(folders[0])
    pf.prepare_model_for_compiled_hotswap(model, target_rank=6)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    scalings = {path: float(layer.scaling["default"]) for path, layer in model.base_model.layers()}
    config = model.peft_config["default"].copy()

    def refused(folder, match, kind=ValueError, name="default", **more):
        with pytest.raises(kind, match=match):
            pf.hotswap_adapter(model, folder, name, **more)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert scalings == {path: float(layer.scaling["default"]) for path, layer in model.base_model.layers()}
        assert model.peft_config["default"] == config

    refused(folders[1], "has rank 7 at model.layers.0.self_attn.q_proj and the model was prepared for 6")
    refused(_saved(tmp_path / "more", target_modules=[*TARGETS, "k_proj"]), "4 unexpected: .*k_proj.lora_A")
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    refused(_edit(_saved(tmp_path / "cut"), lambda t: t.pop(key)), f"1 missing: {key}")
    refused(
        _edit(_saved(tmp_path / "shape"), lambda t: t.update({key: torch.zeros(3, 4)})),
        r"has shape \(3, 4\), the model",
    )
    refused(_edit(_saved(tmp_path / "rank"), config={"r": 5}), r"has shape \(4, 32\), the model expects \(5, 32\)")
    refused(_saved(tmp_path / "dora", use_dora=True), "has use_dora=True and the loaded adapter False")
    refused(_saved(tmp_path / "bias", lora_bias=True), "has lora_bias=True and the loaded adapter False")
    refused(
        _edit(_saved(tmp_path / "pissa"), config={"init_lora_weights": "pissa"}), "init_lora_weights='pissa', which"
    )
    refused(_saved(tmp_path / "head", modules_to_save=["norm"]), "1 unexpected: base_model.model.model.norm.weight")
    (tmp_path / "ia3").mkdir()
    pf.get_peft_model(build("llama"), pf.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    refused(tmp_path / "ia3", "is an adapter of IA3, expected LORA")
    refused(folders[2], "there is no adapter 'other'", name="other")
    refused(folders[2], r"unknown arguments \['x'\]", TypeError, x=1)
    refused(tmp_path / "nowhere", "no adapter_config.json")
    with pytest.raises(TypeError, match="expected a PeftModel"):
        pf.hotswap_adapter(build("llama"), folders[0], "default")
    _randomise(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters \['default'\] are merged into"):
        pf.hotswap_adapter(model, folders[2], "default")
