"""DoRA and the initial values taken from the base, against installed Hugging Face PEFT."""

import json
import warnings

import pytest
import torch
from torch import nn

import pyfastpeft as pf
from tests.methods.contract import scatter
from tests.methods.models import batch, build
from tests.parity.pairs import pair

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_dora(kind, tmp_path):
    theirs, ours = pair(
        kind, r=4, use_dora=True, target_modules="all-linear", bias="lora_only" if kind == "gpt2" else "none"
    )
    trainable = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert set(mine) == set(trainable)
    for name, expected in trainable.items():
        torch.testing.assert_close(mine[name], expected, rtol=1e-6, atol=1e-7, msg=name)
    results = []
    for library, model in ((peft, theirs), (pf, ours)):
        scatter(model)
        output = model.train()(**batch(kind))
        output.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        model.save_pretrained(tmp_path / library.__name__)
        merged = model.eval().merge_and_unload()(**batch(kind)).logits
        results.append({"logits": output.logits, "merged": merged} | gradients)
    for name, expected in results[0].items():
        torch.testing.assert_close(
            results[1][name], expected, rtol=1e-3, atol=2e-5 * expected.abs().max().item() + 1e-8, msg=name
        )
    files = [tmp_path / lib / "adapter_model.safetensors" for lib in ("peft", "pyfastpeft")]
    from safetensors.torch import load_file

    assert {k: v.shape for k, v in load_file(files[0]).items()} == {k: v.shape for k, v in load_file(files[1]).items()}
    for library, folder in ((peft, "pyfastpeft"), (pf, "peft")):
        loaded = library.PeftModel.from_pretrained(build(kind), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(**batch(kind)).logits, results[0]["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_initial_values_and_files(init, tmp_path):
    theirs, ours = pair("llama", r=4, init_lora_weights=init, lora_alpha=12, target_modules=["q_proj", "down_proj"])
    mine = dict(ours.named_parameters())
    for name, expected in theirs.named_parameters():
        torch.testing.assert_close(mine[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    scatter(theirs), scatter(ours)
    expected = theirs.eval()(**batch("llama")).logits
    torch.testing.assert_close(ours.eval()(**batch("llama")).logits, expected, rtol=1e-3, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    texts = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for text in texts:
        text["target_modules"] = sorted(text["target_modules"])
    assert texts[0] == texts[1]
    for library, folder in ((peft, "ours"), (pf, "theirs"), (pf, "ours")):
        loaded = library.PeftModel.from_pretrained(build("llama"), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(**batch("llama")).logits, expected, rtol=1e-3, atol=1e-4)


def test_loraplus():
    from peft.optimizers import create_loraplus_optimizer

    theirs, ours = pair("gpt2", r=4, target_modules=["c_attn"], bias="lora_only")
    options = {"lr": 1e-3, "loraplus_lr_ratio": 8, "loraplus_weight_decay": 0.1}
    optimizers = [
        create_loraplus_optimizer(theirs, torch.optim.AdamW, **options),
        pf.optim.create_loraplus_optimizer(ours, torch.optim.AdamW, **options),
    ]
    sides = []
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        names = {id(p): n for n, p in model.named_parameters()}
        sides.append({names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]})
    assert sides[0] == sides[1] and len(sides[0]) == 6


def test_loraplus_of_other_layers():
    """Embeddings have a rate of their own; convolutions and attention are A and B like the rest."""
    from peft.optimizers import create_loraplus_optimizer

    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.plane = nn.Embedding(11, 8), nn.Conv2d(1, 4, 3, padding=1)
            self.attn, self.line = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    sides = []
    for library, make in ((peft, create_loraplus_optimizer), (pf, pf.optim.create_loraplus_optimizer)):
        names = ["table", "plane", "attn", "line"]
        model = library.get_peft_model(Tables(), library.LoraConfig(r=2, target_modules=names))
        optimizer = make(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_lr_embedding=1e-5)
        paths = {id(p): n.replace("out_lora", "base_layer.out_proj.lora") for n, p in model.named_parameters()}
        sides.append({paths[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]})
    assert sides[0] == sides[1] and len(sides[0]) == 10
    assert {value[0] for value in sides[1].values()} == {1e-3, 8e-3, 1e-5}


@pytest.mark.parametrize("init", [True, False])
def test_lora_bias(init, tmp_path):
    theirs, ours = pair("gpt2", r=4, target_modules=["c_attn", "c_fc"], lora_bias=True, init_lora_weights=init)
    trainable = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert set(mine) == set(trainable) and all(torch.equal(mine[n], p) for n, p in trainable.items())
    scatter(theirs), scatter(ours)
    expected = theirs.eval()(**batch("gpt2")).logits
    torch.testing.assert_close(ours.eval()(**batch("gpt2")).logits, expected, rtol=1e-4, atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    for library, folder in ((peft, "ours"), (pf, "theirs")):
        loaded = library.PeftModel.from_pretrained(build("gpt2"), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(**batch("gpt2")).logits, expected, rtol=1e-4, atol=2e-5)
    merged = [model.merge_and_unload()(**batch("gpt2")).logits for model in (theirs, ours)]
    torch.testing.assert_close(merged[1], merged[0], rtol=1e-4, atol=2e-5)
