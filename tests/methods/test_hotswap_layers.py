"""Hotswap of LoRA's other layers: embeddings, convolutions, attention, Parameters, tied weights; and from a state dict."""

import copy
import warnings

import peft
import pytest
import torch
from peft.utils import hotswap as peft_hotswap
from safetensors.torch import load_file
from torch import nn

import pyfastpeft as pf
from tests.methods.contract import scatter
from tests.methods.every import IDS, LAYERS, PARAMETERS, Every


def build():
    torch.manual_seed(0)
    return Every().eval()


def saved(folder, seed, **options):
    options = {"r": 2, "target_modules": LAYERS, "target_parameters": PARAMETERS} | options
    scatter(pf.get_peft_model(build(), pf.LoraConfig(**options)), seed, 0.3).save_pretrained(folder)
    return folder


def load(folder, **how):
    return pf.PeftModel.from_pretrained(build(), folder, **how)


@pytest.fixture
def folders(tmp_path):
    """The first adapter has all layers; others of another rank, of patterns, and of some of the layers."""
    return [
        saved(tmp_path / "first", 1),
        saved(tmp_path / "wide", 2, r=6, lora_alpha=3, use_rslora=True),
        saved(
            tmp_path / "patterns",
            3,
            rank_pattern={"attn": 5, "experts.up": 3},
            alpha_pattern={"table": 1, "experts.down": 4},
        ),
        saved(tmp_path / "part", 4, r=4, target_modules=["grouped", "up", "cross"], target_parameters=["experts.up"]),
        saved(tmp_path / "few", 5, target_modules=["table", "plane"], target_parameters=None),
    ]


@torch.no_grad()
def test_no_new_graph(folders, tmp_path):
    model = load(folders[0])
    before = model(IDS)
    pf.prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(IDS), before, atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(IDS), before, atol=1e-5, rtol=1e-4)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs
        for folder in (*folders[1:], folders[0]):
            pf.hotswap_adapter(compiled, folder, "default")
            torch.testing.assert_close(compiled(IDS), load(folder)(IDS), atol=1e-5, rtol=1e-4, msg=str(folder))
            model.save_pretrained(tmp_path / "again")
            torch.testing.assert_close(load(tmp_path / "again")(IDS), load(folder)(IDS), atol=1e-6, rtol=1e-5)
            ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "again", folder))
            if ours.keys() == theirs.keys():
                assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
def test_without_preparation(folders, tmp_path):
    """Eager: ranks grow and shrink as they come."""
    model = load(folders[0])
    for folder in (*folders[1:], folders[0], folders[4]):
        pf.hotswap_adapter(model, folder, "default")
        torch.testing.assert_close(model(IDS), load(folder)(IDS), atol=1e-5, rtol=1e-4, msg=str(folder))
        model.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(load(tmp_path / "again")(IDS), model(IDS), atol=1e-6, rtol=1e-5)
    twin = copy.deepcopy(model).double()
    torch.testing.assert_close(twin(IDS).float(), model(IDS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
@torch.no_grad()
def test_variants(variant, tmp_path):
    """DoRA's lengths and the biases of B are swapped, and reset where the new adapter has no layer."""
    names = ["line", "plane", "up", "attn", "cross", "head"] + (["table"] if "use_dora" in variant else [])
    common = {"target_parameters": None} | variant
    first = saved(tmp_path / "a", 1, target_modules=names, **common)
    second = saved(tmp_path / "b", 2, r=4, target_modules=names, **common)
    part = saved(tmp_path / "c", 3, r=1, target_modules=["cross", "line"], **common)
    model = load(first)
    pf.prepare_model_for_compiled_hotswap(model, target_rank=4)
    for folder in (second, part, first):
        pf.hotswap_adapter(model, folder, "default")
        torch.testing.assert_close(model(IDS), load(folder)(IDS), atol=1e-5, rtol=1e-4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.other, self.head = nn.Embedding(11, 8), nn.Embedding(11, 8), nn.Linear(8, 11)
        self.other.weight = self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids) + self.other(ids))


@pytest.mark.parametrize("prepared", [True, False])
@torch.no_grad()
def test_tied_weights(prepared, tmp_path):
    def one(seed, r):
        torch.manual_seed(0)
        config = pf.LoraConfig(r=r, lora_alpha=2 + seed, target_modules=["table"], ensure_weight_tying=True)
        scatter(pf.get_peft_model(Tied().eval(), config), seed).save_pretrained(tmp_path / str(seed))
        return tmp_path / str(seed)

    def of(folder):
        torch.manual_seed(0)
        return pf.PeftModel.from_pretrained(Tied().eval(), folder)

    folders = [one(0, 2), one(1, 5), one(2, 1)]
    model = of(folders[0])
    if prepared:
        pf.prepare_model_for_compiled_hotswap(model, target_rank=5)
    compiled = torch.compile(model, backend="eager") if prepared else model
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=prepared):
        for folder in (*folders[1:], folders[0]):
            pf.hotswap_adapter(compiled, folder, "default")
            torch.testing.assert_close(compiled(IDS), of(folder)(IDS), atol=1e-5, rtol=1e-4)
    inner = model.get_base_model()
    assert inner.other.lora_embedding_A["default"] is inner.table.lora_embedding_A["default"]
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(of(tmp_path / "again")(IDS), of(folders[0])(IDS))
    plain = pf.LoraConfig(r=2, target_modules=["table", "head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scatter(pf.get_peft_model(Tied(), plain)).save_pretrained(tmp_path / "loose")
    with pytest.raises(ValueError, match="has ensure_weight_tying=False and the loaded adapter True"):
        pf.hotswap_adapter(model, tmp_path / "loose", "default")


@pytest.mark.parametrize("keys", ["file", "model"])
@torch.no_grad()
def test_from_a_state_dict(folders, keys, tmp_path):
    """By the keys of a file, or by those of the model, as PEFT wants them."""
    model = load(folders[0])
    pf.prepare_model_for_compiled_hotswap(model, target_rank=8)
    for folder in (*folders[1:], folders[0]):
        state = load_file(folder / "adapter_model.safetensors")
        config = pf.PeftConfig.from_pretrained(folder)
        if keys == "model":
            state = {_with_name(key): tensor for key, tensor in state.items()}
        pf.hotswap_adapter_from_state_dict(model, state, "default", config)
        torch.testing.assert_close(model(IDS), load(folder)(IDS), atol=1e-5, rtol=1e-4, msg=str(folder))
        model.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(load(tmp_path / "again")(IDS), model(IDS), atol=1e-6, rtol=1e-5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bad = {
        "unexpected: .*nowhere": ({"base_model.model.nowhere.lora_A.weight": torch.zeros(2, 8)}, config),
        "missing: .*head.lora_B": ({"base_model.model.head.lora_A.weight": torch.zeros(2, 8)}, config),
        "has shape": (state | {next(iter(state)): torch.zeros(3, 3, 3, 3, 3)}, config),
        "has rank 9 at": (state, pf.LoraConfig(r=9, target_modules=LAYERS, target_parameters=PARAMETERS)),
        "has use_dora=True": (state, pf.LoraConfig(r=2, target_modules=LAYERS, use_dora=True)),
    }
    for message, (wrong, other) in bad.items():
        with pytest.raises(ValueError, match=message):
            pf.hotswap_adapter_from_state_dict(model, wrong, "default", other)
    with pytest.raises(TypeError, match="config is a dict"):
        pf.hotswap_adapter_from_state_dict(model, state, "default", {})
    with pytest.raises(TypeError, match="not a mapping"):
        pf.hotswap_adapter_from_state_dict(model, [1], "default", config)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _with_name(key):
    if key.endswith(("lora_embedding_A", "lora_embedding_B")):
        return f"{key}.default"
    path, _, last = key.rpartition(".")
    return f"{path}.default.{last}"


@torch.no_grad()
def test_as_peft():
    """PEFT swaps linear layers and Conv2d, grouped ones too, by the same state dict."""

    def adapted(library, r, seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 5))
        config = library.LoraConfig(r=r, lora_alpha=3, target_modules=["0", "1", "3"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return scatter(library.get_peft_model(model.eval(), config), seed), config

    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = []
    for library, hotswap in ((pf, pf), (peft, peft_hotswap)):
        other, config = adapted(library, 2, seed=7)
        state = {key: value.clone() for key, value in other.state_dict().items() if "lora_" in key}
        model, _ = adapted(library, 4, seed=8)
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6)
        hotswap.hotswap_adapter_from_state_dict(model, state, "default", config)
        torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-4)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


def test_bad_input(folders, tmp_path):
    model = load(folders[0])
    with pytest.raises(ValueError, match=r"grouped is a convolution with groups=2, which must divide target_rank, 7"):
        pf.prepare_model_for_compiled_hotswap(model, target_rank=7)
    with pytest.raises(ValueError, match="adapter 'default' has rank 2, more than target_rank 1"):
        pf.prepare_model_for_compiled_hotswap(model, target_rank=1)
    assert isinstance(model.get_base_model().table.scaling["default"], float)
    model = load(folders[4])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="unexpected: .*attn"):
        pf.hotswap_adapter(model, folders[0], "default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
