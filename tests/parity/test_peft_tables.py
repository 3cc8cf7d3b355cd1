"""LoRA on embeddings and convolutions, (IA)³ on convolutions, against installed Hugging Face PEFT."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pyfastpeft as pf
from tests.methods.contract import scatter
from tests.methods.models import batch, build

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Convolutions(nn.Module):
    """One, two and three dimensions, strides, padding and groups; x [B, 4, 7, 8]."""

    def __init__(self):
        super().__init__()
        self.two = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False)
        self.point = nn.Conv2d(4, 4, 1)
        self.three = nn.Conv3d(1, 2, (2, 3, 3), padding=1)
        self.one = nn.Conv1d(10, 5, 3, padding="same")

    def forward(self, x):
        x = self.point(self.grouped(torch.tanh(self.two(x))))
        x = self.three(x[:, None]).flatten(1, 2)
        return self.one(x.flatten(2))


def convolutions():
    torch.manual_seed(0)
    return Convolutions().eval()


def image(seed=1):
    return torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(seed))


def embed_ids(model):
    return model(**batch("llama")).logits


def both(make, config_class, run, tmp_path, merge=True, **options):
    """Initial values, forward, gradients, files and merge: ours against theirs."""
    sides = []
    for library in (peft, pf):
        base = make()
        torch.manual_seed(5)
        model = library.get_peft_model(base, getattr(library, config_class)(**options))
        initial = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        scatter(model)
        y = run(model.eval())
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        model.save_pretrained(tmp_path / library.__name__)
        merged = run(model.merge_and_unload()) if merge else None
        sides.append((initial, y.detach(), gradients, merged))
    (initial, y, gradients, merged), mine = sides
    assert set(initial) == set(mine[0])
    for name, value in initial.items():
        torch.testing.assert_close(mine[0][name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(mine[1], y, rtol=1e-4, atol=2e-5)
    for name, value in gradients.items():
        torch.testing.assert_close(mine[2][name], value, rtol=1e-3, atol=2e-5 * value.abs().max().item(), msg=name)
    if merge:
        torch.testing.assert_close(mine[3], merged, rtol=1e-4, atol=5e-5)
    for library, folder in ((peft, "pyfastpeft"), (pf, "peft"), (pf, "pyfastpeft")):
        loaded = library.PeftModel.from_pretrained(make(), tmp_path / folder).eval()
        torch.testing.assert_close(run(loaded), y, rtol=1e-4, atol=2e-5)
    files = [load_file(tmp_path / lib / "adapter_model.safetensors") for lib in ("peft", "pyfastpeft")]
    shapes = [{k: t.shape for k, t in file.items() if "base_layer" not in k} for file in files]
    assert shapes[0] == shapes[1]


LORA = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_embedding(options, tmp_path):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"], "lora_dropout": 0.1} | options
    both(lambda: build("llama"), "LoraConfig", embed_ids, tmp_path, **options)


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_convolutions(options, tmp_path):
    # theirs cannot merge groups
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["one", "two", "three", "point"]} | options
    both(convolutions, "LoraConfig", lambda model: model(image()), tmp_path, **options)


@pytest.mark.parametrize("bias", [False, True])
def test_grouped_convolution(bias, tmp_path):
    options = {"r": 4, "target_modules": ["grouped", "two"], "lora_bias": bias}
    both(convolutions, "LoraConfig", lambda model: model(image()), tmp_path, merge=False, **options)


@pytest.mark.parametrize("inputs", [["two"], ["three", "point"], []])
def test_ia3_convolutions(inputs, tmp_path):
    options = {"target_modules": ["two", "three", "grouped", "point"], "feedforward_modules": inputs}
    both(convolutions, "IA3Config", lambda model: model(image()), tmp_path, **options)


def test_scaled_embedding(tmp_path):
    """Gemma multiplies its embeddings: the update has the same factor."""
    import transformers

    def make():
        torch.manual_seed(0)
        config = transformers.Gemma3TextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        )  # fmt: skip
        return transformers.Gemma3ForCausalLM(config).eval()

    # merging: theirs changes the tied output head too
    both(make, "LoraConfig", embed_ids, tmp_path, merge=False, r=4, target_modules=["embed_tokens"])
